// Vectors of 32-bit lanes, the element types of tensors, and scratch memory.
#if defined(__AVX512F__)
#define VEC_BYTES 64
#define ZIP_LO 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HI 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define VEC_BYTES 32
#define ZIP_LO 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HI 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VEC_BYTES 16
#define ZIP_LO 0, 4, 1, 5
#define ZIP_HI 2, 6, 3, 7
#endif

namespace {

constexpr int VL = VEC_BYTES / 4;  // fp32 lanes
#if defined(__AVX512BF16__)
constexpr bool PAIRED = true;  // whether the processor multiplies and adds pairs of bf16
#else
constexpr bool PAIRED = false;
#endif
constexpr int SPAN = 1024;         // floats gone through at once: they stay in L1
typedef float vf __attribute__((vector_size(VEC_BYTES), may_alias));
typedef uint32_t vu __attribute__((vector_size(VEC_BYTES), may_alias));
typedef int32_t vi __attribute__((vector_size(VEC_BYTES), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VEC_BYTES / 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(VEC_BYTES / 2), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE vu splat(uint32_t v) { return vu{} + v; }
INLINE vu select(vu mask, vu yes, vu no) { return (mask & yes) | (~mask & no); }

// ---- element types -----------------------------------------------------------------------------------------------

enum DType { F32 = 0, BF16 = 1, F16 = 2 };

INLINE float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
INLINE uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

struct Float {
  using T = uint32_t;
  static inline uint32_t widen(T v) { return v; }  // the bits of the fp32 value
  static inline vu widen(vu v) { return v; }
  static inline vu load(const T* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
  static inline T narrow(float f) { return float_bits(f); }
};

struct Half16 {
  using T = uint16_t;
  static inline vu load(const T* p) {
    vh v = *reinterpret_cast<const vh_unaligned*>(p);
    return __builtin_convertvector(v, vu);
  }
};

struct BFloat : Half16 {
  static inline uint32_t widen(T v) { return uint32_t(v) << 16; }
  static inline vu widen(vu v) { return v << 16; }
  static inline T narrow(float f) {  // round to nearest even; a NaN stays a (quiet) NaN
    uint32_t u = float_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return T((u >> 16) | 0x40u);
    return T((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

struct Half : Half16 {
  // Scaling by 2^112 re-biases the exponent and normalises subnormals; infinities and NaNs get the full exponent back.
  static inline uint32_t widen(T h) {
    uint32_t u = float_bits(bits_float(uint32_t(h & 0x7fffu) << 13) * bits_float(0x77800000u));
    if ((h & 0x7c00u) == 0x7c00u) u |= 0x7f800000u;
    return u | (uint32_t(h & 0x8000u) << 16);
  }
  static inline vu widen(vu h) {
    vf scaled = (vf)((h & 0x7fffu) << 13) * (vf)splat(0x77800000u);
    vu special = (vu)((h & 0x7c00u) == splat(0x7c00u)) & 0x7f800000u;
    return (vu)scaled | special | ((h & 0x8000u) << 16);
  }
  static inline T narrow(float f) {  // round to nearest even
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return T(sign | 0x7e00u);
    if (u >= 0x477ff000u) return T(sign | 0x7c00u);  // rounds to 65536 or more
    if (u < 0x38800000u)  // subnormal result: let the fp32 adder round at 2^-24
      return T(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000u));
    return T(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13));
  }
};

// Element i of a tensor of that dtype.
INLINE float element(const void* data, int64_t dtype, int64_t i) {
  return bits_float(dtype == F32 ? static_cast<const uint32_t*>(data)[i]
                    : dtype == BF16 ? BFloat::widen(static_cast<const uint16_t*>(data)[i])
                                    : Half::widen(static_cast<const uint16_t*>(data)[i]));
}

// ---- per-thread scratch, kept between calls: fresh large blocks would be page-faulted in every time ---------------

class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch panel_scratch, block_scratch, cursor_scratch, partial_scratch;

}  // namespace
