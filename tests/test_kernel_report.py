"""The report on GPU kernels: its pure parts on small texts, and one kernel compiled for an NVIDIA and an AMD GPU."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from other_process import run_python
from rich.console import Console

from rosa_fx.errors import RosaError
from rosa_fx.kernels.report import amdgcn, assembly, bars, files, sass, tables, tools
from rosa_fx.kernels.report.architectures import ARCHITECTURES
from rosa_fx.kernels.report.occupancy import programs_in_flight, resident_programs, warpgroups
from rosa_fx.kernels.report.rows import Row
from rosa_fx.kernels.report.source_lines import entry_lines, load_lines
from rosa_fx.passes.inductor_pass import ROSA_PASS

# --- machine code -----------------------------------------------------------------------------------------------------

NVIDIA = """
	.section	.text.triton_tem_fused_0,"ax",@progbits
triton_tem_fused_0:
.text.triton_tem_fused_0:
	//## File "/x/triton_tem_fused_0.py", line 18
        /*0000*/                   LDC R1, c[0x0][0x28] ;
	//## File "/x/triton_tem_fused_0.py", line 62
        /*0010*/                   LDGSTS.E.BYPASS.128 [R19], desc[UR12][R2.64], !P1 ;
.L_x_0:
        /*0020*/                   LDGSTS.E.64 [R20+0xc000], desc[UR12][R10.64], !P3 ;
        /*0030*/              @!P2 LDG.E.U8 R8, desc[UR12][R2.64] ;
	//## File "/x/standard.py", line 62
        /*0040*/                   LDG.E.EL.128 R40, desc[UR6][R64.64] ;
	//## File "/x/triton_tem_fused_0.py", line 70
        /*0050*/                   PRMT R4, R5, 0x5140, R6 ;
        /*0060*/                   HMMA.16816.F32.BF16 R88, R168, R12, R88 ;
        /*0070*/                   HMMA.16816.F32.BF16 R92, R168, R14, R92 ;
        /*0080*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/              @!P0 BRA `(.L_x_0) ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, R164, gdesc[UR4], R24, gsb0 ;
        /*00b0*/                   STL [R1+0x8], R3 ;
        /*00c0*/                   LDL.LU R3, [R1+0x8] ;
        /*00d0*/                   EXIT ;
.L_x_1:
        /*00e0*/                   BRA `(.L_x_1);
        /*00f0*/                   NOP;
.L_x_2:
"""


def test_nvidia_listing() -> None:
    listing = sass.parse(NVIDIA, "triton_tem_fused_0.py")
    assert len(listing.instructions) == 16
    assert listing.spills() == 2
    assert listing.matrix_instructions() == 3
    assert listing.labels == {".L_x_0": 2, ".L_x_1": 14, ".L_x_2": 16}
    loop = listing.main_loop()
    assert [item.base for item in loop] == ["LDGSTS", "LDG", "LDG", "PRMT", "HMMA", "HMMA", "UIADD3", "BRA"]
    assert [item.half_rate for item in loop] == [False] * 3 + [True] + [False] * 4
    assert sum(item.macs for item in loop) == 2 * 16 * 8 * 16
    # The third load stands on line 62 of another file; the first before the loop.
    assert assembly.loads_at(loop, {62}) == [8, 1]
    assert [item.loads for item in loop][:3] == [8, 1, 16]


def test_masked_loads_stand_on_the_line_that_asks_for_them() -> None:
    """Triton writes one as assembly of a line per register that the mask may leave 0, and its last line is what is listed."""
    listing = """
	//## File "/x/k.py", line 12
        /*0000*/               @P2 LDG.E.64 R10, desc[UR10][R6.64] ;
        /*0010*/               @P2 LDG.E R10, desc[UR10][R6.64] ;
        /*0020*/                   LDG.E.128 R12, desc[UR10][R6.64] ;
	//## File "/x/k.py", line 14
        /*0030*/              @!P1 LDG.E.128 R12, desc[UR10][R6.64] ;
"""
    found = sass.parse(listing, "k.py").instructions
    assert [(item.loads, item.line) for item in found] == [(8, 11), (4, 12), (16, 12), (16, 11)]


def test_four_warps_share_a_wide_product() -> None:
    (item,) = [item for item in sass.parse(NVIDIA).instructions if item.base == "HGMMA"]
    assert item.macs * 4 == 64 * 128 * 16


def test_the_loop_that_multiplies_most_is_the_main_loop() -> None:
    def loop(label: str, products: int, others: int) -> str:
        body = ["HMMA.1688.F32 R0, R1, R2, R3 ;"] * products + ["IADD3 R0, R1, R2, RZ ;"] * others + [f"@P0 BRA `({label}) ;"]
        return f"{label}:\n" + "".join(f"        /*{4 * i:04x}*/    {row}\n" for i, row in enumerate(body))

    listing = sass.parse(loop(".L_x_0", 2, 1) + loop(".L_x_1", 5, 3) + loop(".L_x_2", 0, 90))
    assert len(listing.main_loop()) == 9
    assert sass.parse(loop(".L_x_0", 0, 4)).main_loop() == ()


def test_resource_usage() -> None:
    assert sass.usage(" Function k:\n  REG:168 STACK:32 SHARED:0 LOCAL:0 TEXTURE:0") == (168, 32)
    with pytest.raises(RosaError, match="no resource usage"):
        sass.usage("nothing of the kind")


AMD = """
	.loc	1 18 0 prologue_end             ; k.py:18:0
	s_load_dwordx2 s[4:5], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 62 16 is_stmt 1               ; k.py:62:16
	buffer_load_dwordx4 v[2:5], v10, s[56:59], 0 offen
	buffer_load_ubyte v6, v10, s[56:59], 0 offen ; a comment
	v_and_b32_e32 v1, 15, v2
	s_waitcnt vmcnt(0)
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
	s_cbranch_scc1 .LBB0_1
	scratch_store_dword off, v1, s32
	s_endpgm
		.amdhsa_next_free_vgpr 135
    .private_segment_fixed_size: 24
    .vgpr_spill_count: 3
"""


def test_amd_listing() -> None:
    listing = amdgcn.parse(AMD)
    loop = listing.main_loop()
    assert [item.base for item in loop][-1] == "s_cbranch_scc1"
    assert len(loop) == 6
    # Scalar instructions, waits and the product are issued beside the vector instructions.
    assert sum(item.vector for item in loop) == 3
    assert sum(item.macs for item in loop) == 32 * 32 * 8
    assert assembly.loads_at(loop, {62}) == [16, 1]
    assert listing.spills() == 1
    assert amdgcn.usage(AMD) == (135, 3, 24)


def test_lines_of_loads() -> None:
    source = """
def kernel(arg_X, arg_Q, arg_ABSMAX):
    X = arg_X
    Q = arg_Q
    q_pointer = Q + 4 * rows
    for k in range(9):
        x = tl.load(
            X + k,
            mask=ok,
        )
        q = tl.load(q_pointer)
        q_pointer = q_pointer + 64
        s = tl.load(arg_ABSMAX + tl.load(Q + k)).to(tl.float32)
        entry_code = tl.load(
            Q + k)
"""
    assert load_lines(source) == {"X": {7, 8, 9, 10}, "Q": {11, 13, 14, 15}, "ABSMAX": {13}}
    assert entry_lines(source) == {14, 15}


# --- what follows from it ---------------------------------------------------------------------------------------------


def test_pressure_is_that_of_the_sketches() -> None:
    """128×128×64 on sm_80: 1,048,576 multiply-adds take 1024 cycles, in which four schedulers issue 4096 instructions."""
    assert assembly.pressure(512, 8, 128 * 128 * 64, 1024, 1) == pytest.approx(1.0)
    assert assembly.pressure(256, 8, 256 * 128 * 64, 2048, 1) == pytest.approx(0.5)
    assert assembly.pressure(256, 8, 256 * 128 * 64, 2048, 4) == pytest.approx(2.0)


def test_steps_of_an_unrolled_loop() -> None:
    product = assembly.Instruction("HMMA.16816", "", matrix=True, macs=16 * 8 * 16)
    tile = 128 * 128 * 64
    each = tile // product.macs // 8
    assert assembly.steps([product] * each, tile, 8, 4096, 4096) == 1
    assert assembly.steps([product] * 2 * each, tile, 8, 8192, 4096) == 2
    # A small tile, multiplied twice over by warps that share it, is loaded once.
    assert assembly.steps([product] * 2 * each, tile, 8, 4096, 4096) == 1
    assert assembly.steps([assembly.Instruction("UTCHMMA", "", matrix=True)], tile, 8, 0, 4096) == 1


def test_occupancy_of_known_kernels() -> None:
    """Against the tables of NVIDIA's occupancy calculator."""
    a100, h100, t4, mi300 = (ARCHITECTURES[name] for name in ("sm_80", "sm_90", "sm_75", "gfx942"))
    assert resident_programs(a100, 32, 0, 8) == 8  # 64 warps
    assert resident_programs(a100, 255, 0, 8) == 1  # 2 × 8 warps want 2 × 8 × 8192 registers of 65,536
    assert resident_programs(a100, 128, 0, 8) == 2
    assert resident_programs(a100, 129, 0, 8) == 1
    assert resident_programs(a100, 32, 80 << 10, 4) == 2  # 81 KiB each of 164
    assert resident_programs(a100, 32, 82 << 10, 4) == 1
    assert resident_programs(h100, 168, 227 << 10, 8) == 1
    assert resident_programs(h100, 168, 228 << 10, 8) == 0
    assert resident_programs(t4, 64, 0, 8) == 4
    assert resident_programs(t4, 32, 0, 1) == 16
    assert resident_programs(mi300, 128, 0, 4) == 4
    assert resident_programs(mi300, 128, 32 << 10, 4) == 2
    assert warpgroups(2, 8) == 4
    assert programs_in_flight(a100, 2, 100) == 100
    assert programs_in_flight(a100, 2, 1000) == 216


@given(
    st.sampled_from(list(ARCHITECTURES.values())),
    st.integers(16, 255),
    st.integers(0, 240 << 10),
    st.sampled_from([1, 2, 4, 8]),
)
def test_occupancy_keeps_what_a_multiprocessor_has(name: object, registers: int, shared: int, warps: int) -> None:
    architecture = next(item for item in ARCHITECTURES.values() if item == name)
    count = resident_programs(architecture, registers, shared, warps)
    assert 0 <= count <= architecture.programs
    assert count * warps <= architecture.warps
    assert count * (shared + architecture.reserved) <= architecture.shared
    if not architecture.amd:
        assert count * warps * 32 * registers <= architecture.registers
    assert resident_programs(architecture, registers, shared + 1024, warps) <= count


# --- limits -----------------------------------------------------------------------------------------------------------

GOOD = Row(
    kernel="forward nf4, M = 2048",
    phase="training",
    arch="sm_90",
    config="256×128×64, 8 warps, 3 stages",
    default=True,
    tile=(128, 256, 64),
    warps=8,
    stages=3,
    registers=240,
    shared=100 << 10,
    mma=8,
    mma_opcode="HGMMA.64x128x16.F32.BF16",
    instructions=260,
    half_rate=120,
    issue_pressure=0.51,
    pipe_pressure=0.47,
    width=16,
    step_bytes=8192,
    grid=256,
)
DECODE = replace(GOOD, kernel="forward nf4, M = 16", phase="decode", traffic=(0.57, 0.65), grid=512, stages=4, registers=96)
DECODE = replace(DECODE, tile=(16, 32, 128), issue_pressure=4.0, pipe_pressure=3.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": "out of resources"}, "does not compile: out of resources"),
        ({"spills": 4}, "spills: 0 bytes of stack per thread, 4 loads and stores"),
        ({"stack": 16}, "spills: 16 bytes"),
        ({"shared": 240 << 10}, "does not fit"),
        ({"issue_pressure": 0.56}, "issue pressure 0.56, limit 0.55"),
        ({"issue_pressure": None}, "issue pressure unknown"),
        ({"dense_ratio": 1.16}, "1.16 times the issue pressure of Inductor's own product"),
        ({"warps": 4, "shared": 120 << 10}, "1 resident warpgroups"),
        ({"width": 4}, "loaded 4 bytes wide, at least 8"),
    ],
)
def test_each_limit_is_named(change: dict[str, object], said: str) -> None:
    found = bars.missed([replace(GOOD, **change)], frozenset({GOOD.kernel}))  # type: ignore[arg-type]
    assert any(said in text for text in found), found
    assert all(text.startswith("sm_90: forward nf4, M = 2048 (256×128×64") for text in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 8}, "loaded 8 bytes wide, at least 16"),
        ({"traffic": (0.6, 0.7)}, "0.600 bytes moved per weight"),
        ({"grid": 32}, "32 programs in flight ask for"),
        ({"pipe_pressure": 6.0}, "issuing takes 1.14 times as long as moving the bytes"),
    ],
)
def test_limits_of_few_rows(change: dict[str, object], said: str) -> None:
    assert bars.missed([DECODE], frozenset()) == []
    (text,) = bars.missed([replace(DECODE, **change)], frozenset())  # type: ignore[arg-type]
    assert said in text


def test_the_reason_follows_from_the_machine_code() -> None:
    """A step of 32×128 weights by 8 warps: 16 warp instructions of each are one of a lane for a weight."""
    slow = replace(DECODE, instructions=80, half_rate=48, loop_opcodes={"FFMA": 30, "PRMT": 28.0, "LOP3": 20, "HMMA": 2})
    (text,) = bars.missed([replace(slow, issue_pressure=4.5, pipe_pressure=6.0)], frozenset())
    assert "1.14 times as long" in text
    assert "the half-rate integer pipe has 3.0 instructions for each weight, of which memory leaves time for 2.6" in text
    assert "(all 5.0 are issued in 0.86 of it); per warp and step of 32×128 weights: PRMT 28, LOP3 20." in text
    (text,) = bars.missed([replace(slow, issue_pressure=6.0, pipe_pressure=4.5)], frozenset())
    assert "issuing has 5.0 instructions for each weight, of which memory leaves time for 4.4; per warp" in text
    assert "FFMA 30, PRMT 28, LOP3 20, HMMA 2. That is 0.33 of the time" in text
    (text,) = bars.missed([replace(GOOD, warps=4, shared=120 << 10)], frozenset())
    assert "3 stages take 120 KiB of 228 KiB of shared memory; registers alone would let 2 programs in" in text
    (text,) = bars.missed([replace(DECODE, grid=32)], frozenset())
    assert "a weight of 4096×4096 has 32 tiles for 132 multiprocessors; each asks for 3 steps of 8 KiB ahead" in text


def test_what_keeps_the_limits_is_not_named() -> None:
    assert bars.missed([GOOD, replace(GOOD, arch="sm_80", issue_pressure=0.7)], frozenset({GOOD.kernel})) == []
    # Configs that only autotuning considers have to compile without spills, no more.
    other = replace(GOOD, default=False, issue_pressure=3.0, width=1)
    assert bars.missed([other], frozenset({GOOD.kernel})) == []
    assert len(bars.missed([replace(other, stack=8)], frozenset({GOOD.kernel}))) == 1


def test_bytes_asked_for_ahead() -> None:
    assert DECODE.resident == 2
    assert DECODE.in_flight == 264
    assert DECODE.latency_cover == pytest.approx(264 * 8192 * 3 / (3.35e12 * 0.5e-6))


def test_tables_have_every_row() -> None:
    rows = [GOOD, replace(GOOD, default=False, config="64×64×32"), DECODE, replace(GOOD, arch="sm_80", error="no")]
    console = Console(width=200, record=True, file=io.StringIO())
    tables.show(console, rows)
    text = console.export_text()
    for part in ("sm_90: forward nf4, M = 2048", "64×64×32", "0.51", "0.570 / 0.650", "does not compile: no"):
        assert part in text
    page = tables.markdown(rows)
    assert page.count("\n### ") + page.startswith("### ") == 2
    assert "| forward nf4, M = 2048 | **256×128×64, 8 warps, 3 stages** | 240 | 0 | 100 | 1 | 2 | 8 | 260 | 0.51 |" in page
    assert all(line.count(" | ") == page.splitlines()[2].count(" | ") for line in page.splitlines()[2:6] if "---" not in line)


def test_rows_in_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    files.write(file, [GOOD, DECODE])
    assert files.read(file) == [GOOD, DECODE]
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["rows"][1]["in_flight"] == DECODE.in_flight
    file.write_text(json.dumps(content | {"sources": "others"}), encoding="utf-8")
    with pytest.raises(RosaError, match="is of other sources than there are now"):
        files.read(file)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(RosaError, match="holds no rows"):
        files.read(file)


def test_caches_tell_apart_who_asked_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was compiled without the kernels must not be served to who asks for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ROSA_FX_TRITON", "0")
    without = ROSA_PASS.uuid()
    assert without == ROSA_PASS.uuid()
    monkeypatch.setenv("ROSA_FX_TRITON", "1")
    assert without != ROSA_PASS.uuid()


# --- the command ------------------------------------------------------------------------------------------------------


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "rosa_fx.kernels.report", *arguments)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RosaError, match=r"no-such-tool is missing .*install"):
        tools.tool("no-such-tool")


def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    """One kernel for an H100 and an MI300X, through the command."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    file = tmp_path / "rows.json"
    options = ["--quick", "--jobs=1", f"--json={file}"]
    done = report(*options, "--kernel", "forward nf4, M = 16", "--arch", "sm_90", "gfx942")
    assert done.returncode == 0, done.stderr[-3000:]
    nvidia, amd = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert (nvidia["arch"], amd["arch"]) == ("sm_90", "gfx942")
    for row in (nvidia, amd):
        assert row["error"] == ""
        assert row["registers"] > 16
        assert row["shared"] > 0
        assert row["resident"] >= 1
        assert row["mma"] > 0
        assert row["width"] in (1, 2, 4, 8, 16)
        assert row["grid"] > 1
        assert 0.5 < row["traffic"][0] < row["traffic"][1]
    assert "MMA" in nvidia["mma_opcode"]
    assert amd["mma_opcode"].startswith("v_mfma")
    assert "sm_90: forward nf4, M = 16" in done.stdout


def test_kernel_that_python_launches_is_compiled_too(tmp_path: Path) -> None:
    """What the interpreter runs a compiler may refuse: names that a kernel cannot see, say."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    file = tmp_path / "rows.json"
    done = report("--check", "--jobs=1", f"--json={file}", "--kernel", "added in place", "--arch", "sm_90", "gfx942")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        assert (row["error"], row["spills"], row["width"], row["grid"]) == ("", 0, 16, 1024)
        assert row["mma"] > 0
