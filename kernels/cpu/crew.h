// Threads of a parallel region that wait for each other awake.
//
// OpenMP's barriers may put a thread to sleep at once (OMP_WAIT_POLICY=PASSIVE, which shared machines need), and waking it takes
// some 50 us: as long as many a region here. So threads meet here first, and find the barrier behind it open.
namespace {

INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class F>
void wait_until(const F& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < 1000) pause();
    else std::this_thread::yield();  // where threads outnumber cores, the one that is waited for may need this one
  }
}

// Threads among which to spread work that takes one of them so many us. One that is wanted comes at once where it has been waiting
// awake, as OpenMP has it for some ms by default, and some 40 us later where the user lets it sleep.
inline int threads_for(double us, int64_t most) {
  static const bool asleep = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy && (*policy == 'p' || *policy == 'P');
  }();
  return int(std::max<int64_t>(1, std::min(most, int64_t(us / (asleep ? 40 : 3)))));
}

class Crew {
 public:
  // All threads of the region have come here. Called by each of them, as many times by each.
  void meet() {
    const int64_t threads = omp_get_num_threads(), round = came_.fetch_add(1) / threads;
    wait_until([&] { return came_.load() >= (round + 1) * threads; });
  }

  // The last call in the region, by each thread: the one that goes on behind it stays awake for the others.
  void finish() {
    if (omp_get_thread_num()) left_.fetch_add(1);
    else {
      wait_until([&] { return left_.load() >= omp_get_num_threads() - 1; });
      for (int i = 0; i < 8 && omp_get_num_threads() > 1; ++i) pause();  // what they have before they are at the barrier
    }
  }

 private:
  std::atomic<int64_t> came_{0}, left_{0};
};

// Work that comes before the rest of a region: units are taken by whoever is awake, and nobody goes on before all are done. A
// barrier, and a meeting too, would wait for threads that are still being woken, which takes longer than the work.
struct Prologue {
  std::atomic<int64_t> next{0}, done{0};
  template <class F>
  void run(int64_t units, const F& unit) {
    for (int64_t u; (u = next.fetch_add(1)) < units; done.fetch_add(1)) unit(u);
    wait_until([&] { return done.load() >= units; });
  }
};

}  // namespace
