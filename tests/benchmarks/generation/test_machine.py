from benchmarks.generation import machine

CPUINFO = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: another
"""


def test_a_cpu_is_named_with_its_model_and_the_limits_on_it():
    assert machine.cpu_name(CPUINFO, {}) == "Some Xeon (family 6, model 143)"
    limited = machine.cpu_name(CPUINFO, {"ATEN_CPU_CAPABILITY": "avx2", "HOME": "/root"})
    assert limited == "Some Xeon (family 6, model 143), ATEN_CPU_CAPABILITY=avx2"


def test_without_cpuinfo_a_cpu_still_has_a_name():
    assert machine.cpu_name("", {})
    assert machine.instruction_sets("") == []


def test_instruction_sets_of_the_kernels_are_listed():
    assert machine.instruction_sets(CPUINFO) == ["avx2", "avx512f", "avx512_vnni", "amx_int8"]
    assert machine.instruction_sets("Features\t: fp asimd asimddp i8mm") == ["asimddp", "i8mm"]


def test_bandwidth_is_measured():
    assert machine.read_bandwidth(1 << 20, seconds=0.01) > 0


def test_bandwidth_is_that_of_the_fastest_read(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now_s.append(now_s[-1] + len(now_s)) or now_s[-1])
    assert (
        machine.read_bandwidth(1 << 20, seconds=10) == (1 << 20) / 3
    )  # of the reads, the first is the fastest here: 3 s
