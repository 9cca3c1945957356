"""Variables of ranks: torchrun's are taken, a pod's are left alone, and what can't be is named in a sentence."""

import pytest
from families import small_config

import train
from longctx import torchrun
from longctx.errors import UserError
from longctx.options import parse_job

OF_TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
OF_A_POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "another-pod", "MASTER_PORT": "23456"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(variables: dict[str, str]) -> None:
        for name in OF_TORCHRUN | OF_A_POD:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to({})
    return set_to


@pytest.fixture
def words(tmp_path) -> list[str]:
    small_config("llama").save_pretrained(tmp_path / "model")
    places = {
        "model_id": tmp_path / "model",
        "compiled_dir": tmp_path / "compiled",
        "name": "podded",
        "engine": "torch",
    }
    given = {**places, "sequence_length": 16, "device": "cpu", "precision": "fp32"}
    return [f"--{name}={value}" for name, value in given.items()]


def test_the_ranks_that_torchrun_started_know_their_numbers(environment):
    environment(OF_TORCHRUN)
    ranks = torchrun.rank(), torchrun.world_size(), torchrun.local_rank(), torchrun.local_world_size()
    assert ranks == (1, 4, 1, 2)
    assert torchrun.started_this() and torchrun.why_not_usable() is None


def test_compile_takes_no_notice_of_a_pods_variables_and_waits_for_no_other(environment, words, tmp_path):
    environment(OF_A_POD)
    train.main([*words, "--run_mode=compile"])
    assert (tmp_path / "compiled" / "podded" / "plan.json").is_file()


def test_a_process_without_torchrun_runs_alone_where_a_pod_says_that_it_is_alone(environment):
    environment({**OF_A_POD, "RANK": "0", "WORLD_SIZE": "1"})
    assert torchrun.why_not_usable() is None
    assert (torchrun.started_this(), torchrun.world_size()) == (False, 1)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: torchrun did not start this process; .*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, "WORLD_SIZE=8: torchrun did not start this process; start it with torchrun"),
        ({"RANK": "3"}, "RANK=3: torchrun did not start this process"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: torchrun did not start this process"),
        ({**OF_TORCHRUN, "RANK": "4"}, "RANK=4: there are 4 ranks"),
        ({**OF_TORCHRUN, "RANK": "x"}, "RANK=x: torchrun sets it to a number"),
        ({**OF_TORCHRUN, "RANK": "9" * 5000}, "RANK=9+: torchrun sets it to a number"),
        ({**OF_TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2: there are 2 ranks"),
        ({**OF_TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5: there are 4 ranks"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "WORLD_SIZE=: torchrun sets it to a number"),
    ],
)
def test_variables_that_can_not_be_are_named_before_a_run_begins(environment, words, variables, sentence):
    environment(variables)
    with pytest.raises(UserError, match=f"^{sentence}"):
        parse_job(words)
