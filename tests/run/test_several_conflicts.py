"""What goes together with weights that are spread over the processes, and what is refused before any is read."""

from __future__ import annotations

import pytest

from tuner import pipeline
from tuner.assembly import assemble, new_run
from tuner.builtin.planner.memory import predict
from tuner.data.samples import Bucket
from tuner.errors import ConfigError
from tuner.testing.killing import start_several
from tuner_wan.tiny import build_tiny

SPREAD = {"fsdp_enable": True}


@pytest.fixture
def two_processes(monkeypatch):
    """As one of two processes, before they are connected."""
    monkeypatch.setenv("WORLD_SIZE", "2")


def refusal(job, **keys):
    with job.on_path(), pytest.raises(ConfigError) as error:
        pipeline.survey(assemble(job.config("never", **keys)))
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"enable_group_offload": True}, "leave enable_group_offload out"),
        ({"base_model_precision": "int8-quanto"}, "base_model_precision 'int8-quanto' do not go together"),
        ({"model_type": "full", "gradient_release": True, "max_grad_norm": 0}, "leave gradient_release out"),
        ({"model_type": "full", "optimizer": "bnb-adamw8bit"}, "such as ao-adamw8bit"),
        ({"model_type": "full", "optimizer": "prodigy"}, "cannot step weights that are spread"),
        ({"scheduled_sampling_max_step_offset": 2}, "their rollouts differ in length"),
        ({"deepspeed_config": "zero3.json"}, "leave it out: fsdp_enable: true does what ZeRO 3 does"),
    ],
)
def test_what_does_not_go_with_spread_weights_is_refused(job, two_processes, keys, said):
    assert said in refusal(job, **SPREAD, **keys)


def test_an_optimizer_that_cannot_step_parts_steps_what_an_adapter_trains(job, two_processes):
    with job.on_path():
        pipeline.survey(assemble(job.config("never", **SPREAD, optimizer="prodigy", learning_rate=1)))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_what_accelerate_launch_is_configured_to_do_itself_is_refused(job, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    said = refusal(job)
    assert variable in said
    assert "fsdp_enable: true does what ZeRO 3 does" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_enable is false"),
        ({**SPREAD, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "what an adapter trains is not spread"),
    ],
)
def test_a_way_to_save_parts_that_there_are_none_of_is_said_to_do_nothing(job, two_processes, keys, said):
    with job.on_path():
        assert f"fsdp_state_dict_type does nothing: {said}" in assemble(job.config("never", **keys)).warnings


def test_two_experts_held_to_their_base_learn_what_they_do_in_one_process(job, steps_of, tmp_path_factory):
    """Samples that ask the base are in some micro-batches only: every process asks it all the same."""
    base = build_tiny(tmp_path_factory.mktemp("tiny") / "both", "t2v-14b-2.2-both", layers=1)
    keys = {
        "model_family": "wan",
        "model_flavour": "t2v-14b-2.2-both",
        "pretrained_model_name_or_path": str(base),
        "train_batch_size": 1,
        "max_train_steps": 3,
        "wan_expert_switch_steps": 1,
        "learning_rate": 1e-3,
    }

    def config(output, **more):
        made = job.config(output, **{**keys, **more})
        clips, text = made["data_backend_config"]
        clips = {**clips, "cache_dir_vae": str(job.folder / "cache" / "experts")}
        held = {**clips, "id": "held", "is_regularisation_data": True}
        held["cache_dir_vae"] = str(job.folder / "cache" / "experts-held")
        text = {**text, "cache_dir": str(job.folder / "cache" / "experts-text")}
        return {**made, "data_backend_config": [clips, held, text]}

    pipeline.run(assemble(config("spread-experts-one", gradient_accumulation_steps=2)))
    ranks = start_several(config("spread-experts", **SPREAD), [str(job.distribution)])
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    one, two = (steps_of(job.folder / name) for name in ("spread-experts-one", "spread-experts"))
    assert {line["network"] for line in two} == {"transformer", "transformer_2"}
    for line, other in zip(two, one, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("keys", [{}, {"model_type": "full"}], ids=["lora", "full"])
def test_the_predicted_memory_is_that_of_a_part(monkeypatch, keys):
    def predicted(processes, **more):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        settings = {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1", "data_backend_config": []}
        assembly = assemble({**settings, **SPREAD, **keys, **more})
        run = new_run(assembly)
        spec = pipeline.describe(run, assembly.manager)
        return predict(run.estimate(spec.networks[0], Bucket(81, 480, 832), 1))

    one, four = predicted(1).device, predicted(4).device
    assert four["base weights"] == pytest.approx(one["base weights"] / 4)
    assert four["gathered weights"] < 0.2 * one["base weights"]
    state = 4 if keys else 1  # of an adapter every process has all
    assert four["optimizer state"] == pytest.approx(one["optimizer state"] / state)
    kept = predicted(4, fsdp_reshard_after_forward=False).device
    assert kept["gathered weights"] > 0.9 * one["base weights"]
    assert predicted(4, fsdp_cpu_offload=True).host["base weights"] == four["base weights"]
