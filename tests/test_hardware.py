"""The tables against published measurements, the cost of collectives, and a profile measured as a person would."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import run_script

from longctx import measure as measuring
from longctx.compiler.hardware import HARDWARE, Timing, collective_seconds, identify, load
from longctx.compiler.work import Work
from longctx.errors import HardwareError, UserError
from longctx.measure import KINDS

ROOT = Path(__file__).parent.parent
MIB = 2**20


@pytest.mark.parametrize("entry", HARDWARE.values(), ids=lambda entry: entry.name)
def test_every_entry_of_the_hardware_table_is_plausible(entry):
    assert set(entry.rates) == set(Work)
    rate = {work: rate.a_second for work, rate in entry.rates.items()}
    assert entry.product_rate(Work.PRODUCTS, torch.bfloat16) == rate[Work.PRODUCTS] <= entry.matrix_flops
    assert entry.product_rate(Work.PRODUCTS, torch.float32) == rate[Work.FLOAT32_PRODUCTS]
    assert 0 < rate[Work.STRIDED] < rate[Work.COPIES]
    if entry.published_peak:
        assert 0 < rate[Work.ATTENTION_BACKWARD] < rate[Work.ATTENTION_FORWARD] < rate[Work.PRODUCTS]
    assert all(rate.source.startswith(("measured, ", "derived from ", "published, ")) for rate in entry.rates.values())
    assert entry.network.bandwidth <= entry.node_link.bandwidth and entry.node_link.latency <= entry.network.latency
    for link in (entry.node_link, entry.network):
        assert 0 < link.pair_bandwidth <= link.bandwidth and 0 < link.efficiency <= 1


def test_a_gpus_name_finds_its_entry_and_no_namesakes():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA B200": "b200",
        "AMD Instinct MI300X": "mi300x",
        "NVIDIA GH200 480GB": None,
        "NVIDIA GB200": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    assert {name: getattr(identify(name), "name", None) for name in names} == names


# Bus bandwidths in GB/s of NCCL's and RCCL's all-reduce at MiB of payload, from github.com/stas00/ml-engineering,
# network/README.md. On one node of H200 or B200 NVLink SHARP makes the largest up to 1.3 times faster than a ring.
PUBLISHED = {
    ("h200", 8): {1: 39.93, 2: 64.53, 4: 107.16, 16: 219.89, 64: 346.51, 128: 401.93, 1024: 463.58, 16384: 482.26},
    ("b200", 8): {1: 36.06, 4: 76.48, 16: 254.96, 64: 400.60, 128: 568.38, 1024: 723.34, 16384: 845.67},
    ("b200", 32): {1: 5.37, 4: 18.90, 16: 64.43, 64: 156.74, 128: 197.94, 1024: 361.99, 16384: 381.80},
    ("a100", 8): {16384: 234.89},
    ("mi300x", 2): {4096: 47.671},
    ("mi300x", 8): {4096: 312.912},
}


@pytest.mark.parametrize(("name", "n_ranks"), PUBLISHED)
def test_all_reduce_takes_as_long_as_published(name, n_ranks):
    for mib, bus_bandwidth in PUBLISHED[name, n_ranks].items():
        published = mib * MIB * 2 * (n_ranks - 1) / n_ranks / (bus_bandwidth * 1e9)
        assert 0.65 < collective_seconds(HARDWARE[name], "all_reduce", mib * MIB, n_ranks) / published < 1.4, mib


def test_large_collectives_cost_what_their_bytes_cost():
    """On an H200 at 8 ranks: all-reduce twice an all-gather, all-to-all an eighth of it."""
    gather, scatter, reduce, exchange = (collective_seconds(HARDWARE["h200"], kind, 2**36, 8) for kind in KINDS)
    assert gather == scatter == pytest.approx(2**36 * 7 / 8 / (450e9 * 0.80), rel=1e-3)
    assert reduce == pytest.approx(2 * gather, rel=1e-3) and exchange == pytest.approx(gather / 8, rel=1e-3)


MEASURED = replace(HARDWARE["cpu"], timings=(Timing("all_gather", 8, (16, 64, 1024), (1e-3, 1e-3, 5e-3)),))


@given(
    entry=st.sampled_from([*HARDWARE.values(), MEASURED]),
    kind=st.sampled_from(KINDS),
    n_ranks=st.sampled_from([1, 2, 4, 8, 12, 16, 64]),
    sizes=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)).map(sorted),
)
def test_a_collective_of_more_bytes_never_takes_less_time(entry, kind, n_ranks, sizes):
    fewer, more = (collective_seconds(entry, kind, size, n_ranks) for size in sizes)
    assert 0 <= fewer <= more and (more > 0) == (n_ranks > 1)


def test_a_measured_collective_is_interpolated_and_others_are_modelled():
    at = {size: collective_seconds(MEASURED, "all_gather", size, 8) for size in (1, 16, 544, 1024, 4096)}
    assert at == pytest.approx({1: 1e-3, 16: 1e-3, 544: 3e-3, 1024: 5e-3, 4096: 20e-3})
    for kind, n_ranks in (("all_gather", 4), ("all_to_all", 8)):
        modelled = collective_seconds(HARDWARE["cpu"], kind, MIB, n_ranks)
        assert collective_seconds(MEASURED, kind, MIB, n_ranks) == modelled


def test_a_profile_measured_on_two_ranks_loads_and_prices_collectives(tmp_path):
    file = tmp_path / "profile.json"
    result = run_script("longctx.measure", "--output", file, n_ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    profile = json.loads(file.read_text())
    assert profile["ranks"] == 2 and profile["torch"] == torch.__version__ and profile["machine"]
    assert list(tmp_path.iterdir()) == [file]

    measured = load(str(file))
    assert json.loads(json.dumps(asdict(measured))) == profile["hardware"]
    derived = {work for work, rate in measured.rates.items() if not rate.is_measured}
    assert derived == {Work.FSDP_COPIES, Work.OPTIMIZER}
    assert measured.rates[Work.STRIDED].source == f"measured, {profile['machine']}, PyTorch {torch.__version__}"
    assert all(1e8 < rate.a_second < 1e14 for rate in measured.rates.values())
    assert [(timing.kind, timing.n_ranks) for timing in measured.timings] == [(kind, 2) for kind in KINDS]
    for kind in KINDS:
        seconds = [collective_seconds(measured, kind, 4**exponent, 2) for exponent in range(18)]
        assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1]
        assert collective_seconds(measured, kind, MIB, 4) > 0  # from the links that the all-gather fits
    assert measured.node_link != HARDWARE["cpu"].node_link


def test_the_hardware_of_this_machine_is_found_without_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(None).name == "h100" and load("B200").name == "b200"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AMD Instinct MI300X")
    assert load(None).name == "mi300x"


def test_a_wrong_name_or_profile_of_hardware_is_refused_with_the_names_there_are(tmp_path):
    good = json.loads(json.dumps(asdict(MEASURED)))
    contents = [
        "no json",
        "[1]",
        "{}",
        json.dumps({"hardware": {**good, "timings": [{**good["timings"][0], "seconds": [1e-3]}]}}),
        json.dumps({"hardware": {**good, "node_link": {**good["node_link"], "efficiency": 1.5}}}),
        json.dumps({"hardware": {**good, "matrix_flops": -1.0}}),
        json.dumps({"hardware": {**good, "rates": {"matrix products": good["rates"]["matrix products"]}}}),
        json.dumps({"hardware": {**good, "memory_bytes": "80 GB"}}),
        json.dumps({"hardware": {name: value for name, value in good.items() if name != "network"}}),
    ]
    files = [tmp_path / f"{number}.json" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    for name in ("h1000", str(tmp_path), str(tmp_path / "none.json"), *map(str, files)):
        with pytest.raises(HardwareError, match=r"(?s)one of a100, b200, cpu, h100, h200, mi300x$") as error:
            load(name)
        assert "\n" not in str(error.value)


def test_a_profile_from_before_there_were_rates_by_kind_of_work_is_to_be_measured_again(tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"hardware": {"name": "H100", "matrix_flops": 9e14, "matrix_efficiency": 0.8}}))
    with pytest.raises(
        HardwareError, match=r"^it is an older profile, .*; write it anew with python -m longctx.measure"
    ):
        load(str(file))


def test_measuring_needs_somewhere_to_write_and_replaces_nothing_but_a_profile(monkeypatch, tmp_path):
    (tmp_path / "thesis.json").write_text('{"chapters": 5}')
    for output in (tmp_path, tmp_path / "none" / "profile.json", tmp_path / "thesis.json"):
        monkeypatch.setattr(sys, "argv", ["measure", "--output", str(output)])
        with pytest.raises(UserError, match="--output"):
            measuring.main()
    assert (tmp_path / "thesis.json").read_text() == '{"chapters": 5}'
    measuring.check_output(tmp_path / "new.json")
    (tmp_path / "old.json").write_text(json.dumps(dict.fromkeys(measuring.PROFILE_FIELDS, 1)))
    measuring.check_output(tmp_path / "old.json")


def test_float32_and_cpus_have_no_published_peak_and_so_no_mfu():
    assert HARDWARE["h100"].peak_rate(torch.bfloat16) == 989e12
    assert HARDWARE["h100"].peak_rate(torch.float32) is None
    assert HARDWARE["cpu"].peak_rate(torch.bfloat16) is None
