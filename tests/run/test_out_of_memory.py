"""Out of memory: the run ends with every step saved, says what held the memory, and goes on bit-equal."""

from __future__ import annotations

import pytest
import torch

from tuner.errors import TrainingError
from tuner.testing.plugin_env import importable, write_distribution

GREEDY = '''
import torch
from tuner import Plugin, hookimpl

class Greedy(Plugin):
    """Wants more memory than there is, at the moment that its class names."""
    at = "forward"

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore about it.")

    @hookimpl(wrapper=True)
    def compute_loss(self, run):
        loss = yield
        if run.step == 2 and self.at == "forward":
            self.fail()
        return loss

    @hookimpl
    def validate(self, run, model):
        if run.step == 2 and self.at == "validation":
            self.fail()

    @hookimpl
    def memory_advice(self, run, model):
        return ["first", "second", "third", "fourth"]
'''


@pytest.fixture
def greedy(tmp_path):
    modules = {"greedy_module": GREEDY}
    with importable(write_distribution(tmp_path, "tuner-greedy", {"greedy": "greedy_module:Greedy"}, modules=modules)):
        yield


@pytest.mark.usefixtures("greedy")
def test_a_step_that_does_not_fit_ends_the_run_with_all_steps_before_it_saved(job, state_of, steps_of):
    whole = job.run("oom-whole")
    with pytest.raises(TrainingError) as caught:
        job.run("oom", plugins=["toy", "greedy"])
    message = str(caught.value)
    assert "out of memory in step 3: CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert "More about it" not in message
    assert "frozen weights of transformer" in message
    assert "first; or second; or third" in message
    assert "fourth" not in message
    assert str(job.folder / "oom" / "checkpoint-2") in message
    output = job.run("oom", resume_from_checkpoint="latest")
    assert state_of(output, 6) == state_of(whole, 6)
    assert steps_of(output) == steps_of(whole)


@pytest.mark.usefixtures("greedy")
def test_a_validation_that_does_not_fit_loses_neither_step_nor_log_line(job, monkeypatch, state_of, steps_of):
    whole = job.run("oom-validation-whole", validation_step_interval=0)
    with job.on_path():
        from greedy_module import Greedy  # type: ignore[import-not-found]

        monkeypatch.setattr(Greedy, "at", "validation")
        with pytest.raises(TrainingError, match="out of memory"):
            job.run("oom-validation", plugins=["toy", "greedy"], validation_step_interval=2)
    output = job.run("oom-validation", resume_from_checkpoint="latest", validation_step_interval=0)
    assert state_of(output, 6) == state_of(whole, 6)
    assert [line["step"] for line in steps_of(output)] == [1, 2, 3, 4, 5, 6]


def test_a_cut_short_optimizer_step_is_never_saved(job, monkeypatch):
    """Weights of which some were updated and some were not belong in no checkpoint."""
    plain = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        if all(state["step"] >= 2 for state in self.state.values()) and self.state:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match="the optimizer was cut short"):
        job.run("oom-optimizer", checkpoint_step_interval=1)
    assert sorted(each.name for each in (job.folder / "oom-optimizer").glob("*checkpoint*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_the_hosts_allocator_is_understood_too():
    from tuner.train.memory import is_out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
