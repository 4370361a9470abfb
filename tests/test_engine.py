"""The engine against plain PyTorch, DeepSpeed's traps, and the checks of its JSON. One process; see test_checkpoint for
two ranks."""

import json
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
import toy

from sft import engine
from sft.config import DEEPSPEED_CONFIGS, TrainConfig, UserError
from sft.finite import DivergedError, FiniteWatch
from sft.schedule import learning_rate_factor


def write(directory, keys):
    path = directory / "ds.json"
    path.write_text(keys if isinstance(keys, str) else json.dumps(keys))
    return TrainConfig(deepspeed_config=str(path))


# The dictionary


@pytest.mark.parametrize("path", sorted(DEEPSPEED_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_json_is_accepted_by_name_and_by_path(path):
    for name in (path.stem, str(path)):
        keys = engine.deepspeed_dict(TrainConfig(deepspeed_config=name), world_size=2)
        assert keys["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
        assert keys["zero_optimization"]["overlap_comm"] is False  # open NaN reports


def test_numbers_come_from_the_config_alone():
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=4, max_grad_norm=0.5, precision="fp32")
    keys = engine.deepspeed_dict(config, world_size=2)
    assert keys["train_micro_batch_size_per_gpu"] == 3
    assert keys["gradient_accumulation_steps"] == 4
    assert keys["train_batch_size"] == 24
    assert keys["gradient_clipping"] == 0.5
    assert not keys["bf16"]["enabled"]
    assert "data_types" not in keys


def test_bf16_gradients_are_summed_in_fp32_where_deepspeed_can():
    def summed_in(**settings):
        keys = engine.deepspeed_dict(TrainConfig(**settings), world_size=1)
        return keys.get("data_types", {}).get("grad_accum_dtype")

    assert summed_in(gradient_accumulation_steps=8) == "fp32"
    assert summed_in(gradient_accumulation_steps=8, deepspeed_config="zero3") == "fp32"
    assert summed_in(gradient_accumulation_steps=1) is None
    assert summed_in(gradient_accumulation_steps=8, deepspeed_config="zero1") is None
    assert summed_in(gradient_accumulation_steps=8, deepspeed_config="zero2_offload") is None


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ("{", "not a readable JSON"),
        ([], "zero_optimization"),
        ({"bf16": {"enabled": True}}, "zero_optimization"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 8}, "train_batch_size"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "optimizer"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 0}}, "allowed are 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "allowed are 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "overlap_com": False}}, "did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme"),
    ],
)
def test_json_mistake_names_file_and_key_in_one_line(tmp_path, keys, named):
    with pytest.raises(UserError) as error:
        engine.deepspeed_dict(write(tmp_path, keys), world_size=1)
    assert named in str(error.value)
    assert "ds.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_json_name_lists_those_that_exist():
    with pytest.raises(UserError, match="zero9: no such file.*zero1, zero2, zero2_offload, zero3"):
        engine.deepspeed_dict(TrainConfig(deepspeed_config="zero9"), world_size=1)


# The schedule


def test_schedule_at_hand_computed_steps():
    def factor(step, kind="cosine"):
        return learning_rate_factor(step, total_steps=10, warmup_steps=2, kind=kind)

    assert [factor(step) for step in (0, 1, 2)] == [1 / 3, 2 / 3, 1.0]
    assert factor(6) == pytest.approx(0.5)  # halfway from step 2 to 10
    assert factor(9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert factor(9) > 0
    assert factor(6, "linear") == pytest.approx(0.5)
    assert factor(9, "linear") == pytest.approx(1 / 8)
    assert [factor(step, "constant") for step in (2, 9)] == [1.0, 1.0]
    assert factor(10) == factor(99) == 0.0


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate_factor(0, total_steps=1, warmup_steps=0, kind="cosine") == 1.0


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        learning_rate_factor(0, 10, 0, "step")


# The process group


def test_plain_process_becomes_the_only_rank_on_a_free_port(ranks):
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main) == (0, 0, 1, True)
    assert os.environ["MASTER_PORT"] != "29500"
    assert engine.start(TrainConfig(precision="fp32")) == ranks
    assert engine.gather_objects("x") == ["x"]
    assert engine.all_reduce_sum(torch.tensor([2**53 + 1], device=ranks.device)).item() == 2**53 + 1


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_rank_alone_leaves_a_port_on_which_somebody_listens(world_size):
    """Reserved is a port only against those that do not set SO_REUSEADDR before they ask for any."""
    code = "import os, socket; from sft import engine; from sft.config import TrainConfig; other = socket.socket()\n"
    code += "other.bind(('', 0)); other.listen(); port = str(other.getsockname()[1])\n"
    code += f"os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='{world_size}', MASTER_ADDR='127.0.0.1')\n"
    code += "os.environ['MASTER_PORT'] = port; engine.start(TrainConfig(precision='fp32'))\n"
    code += "engine.barrier(); assert os.environ['MASTER_PORT'] != port; engine.shut_down()"
    root = DEEPSPEED_CONFIGS.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert (done.returncode == 0) == (world_size == "1"), done.stderr
    assert world_size == "1" or "EADDRINUSE" in done.stderr


def test_a_first_step_does_not_load_torchs_compiler():
    """It imports DeepSpeed's Muon, whose functions would have themselves compiled; a second, for what is not used."""
    code = """if True:
        import sys, toy
        from sft import engine
        from sft.config import TrainConfig
        config = TrainConfig(precision="fp32", gradient_accumulation_steps=1)
        ranks = engine.start(config)
        toy.train(toy.build(config, ranks), config, ranks, range(1))
        engine.shut_down()
        modules = ("deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx")
        print(*(name in sys.modules for name in modules), engine.torch.compile.__module__)
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "WORLD_"))}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join((str(toy.ROOT / "tests"), toy.PYTHONPATH))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False torch"


def test_incomplete_launch_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2"):
        engine.start(TrainConfig(precision="fp32"))


# The thread of a backward pass


def where_it_runs():
    """The thread, and whether autograd may have others."""
    return threading.get_ident(), torch.autograd.is_multithreading_enabled()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def watched(request):
    """A scalar whose backward pass notes where it runs, and the notes."""
    found = []
    weight = torch.ones(2, device=request.param, requires_grad=True)
    value = weight * 2
    value.register_hook(lambda _: found.append(where_it_runs()))
    return value.sum(), found


def test_a_backward_pass_runs_in_the_thread_that_asks_for_it(watched):
    """On a GPU torch would wake a thread of its own; on a CPU it never does, and only the setting can be seen."""
    value, found = watched
    with engine.in_this_thread():
        value.backward()
    assert found == [(threading.get_ident(), False)]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engines_backward_pass_runs_in_the_thread_that_asks_for_it(ranks, tmp_path, stage):
    """Both of them under ZeRO-2: autograd's own, and DeepSpeed's, which gives the vectors their gradients."""
    ds_engine, found = toy.build(toy.config(tmp_path, stage), ranks), []
    loss = ds_engine(toy.tokens(0, 0, ranks, 2), 0)
    for tensor in (loss, *(vector.parameter for vector in ds_engine.vectors)):
        tensor.register_hook(lambda _: found.append(where_it_runs()))
    ds_engine.backward(loss)
    assert found == [(threading.get_ident(), False)] * (1 + len(ds_engine.vectors))
    assert bool(ds_engine.vectors) == (stage == 2)


def test_after_a_backward_pass_autograd_may_have_threads_again_also_where_it_failed():
    assert torch.autograd.is_multithreading_enabled()
    with engine.in_this_thread():
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()
    with pytest.raises(RuntimeError, match="in the middle"), engine.in_this_thread():
        raise RuntimeError("in the middle")
    assert torch.autograd.is_multithreading_enabled()


# Training


def plain_training(settings, ranks, steps):
    """What the engine is meant to compute, in plain PyTorch: fp32 master, compute copies, clipped AdamW."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = toy.Toy(dropout=0.0).to(ranks.device).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    copies = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in copies.items()}
    groups = toy.param_groups(model)
    by_copy = {id(p): masters[name] for name, p in copies.items()}
    groups = [group | {"params": [by_copy[id(p)] for p in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            warmup_steps = math.ceil(settings.warmup_ratio * toy.TOTAL_STEPS)
            group["lr"] = peak * learning_rate_factor(step, toy.TOTAL_STEPS, warmup_steps, "cosine")
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in range(settings.gradient_accumulation_steps):
            model.zero_grad()
            loss = model(toy.tokens(step, micro, ranks, settings.batch_size), step)
            (loss / settings.gradient_accumulation_steps).backward()
            for name, copy in copies.items():
                if copy.grad is not None:
                    masters[name].grad += copy.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), settings.max_grad_norm)
        optimizer.step()
        for name, copy in copies.items():
            copy.data.copy_(masters[name])
    return masters, norm


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (3, False), (2, True)])
def test_fp32_training_equals_plain_adamw(ranks, tmp_path, stage, offload):
    settings = toy.config(tmp_path, stage, offload, precision="fp32", max_grad_norm=0.3)
    masters, norm = plain_training(settings, ranks, steps=4)
    ds_engine = toy.build(settings, ranks)
    toy.train(ds_engine, settings, ranks, range(4))
    state = engine.training_tensors(ds_engine)
    assert float(ds_engine.gradient_norm()) == pytest.approx(float(norm), rel=1e-4)
    assert state["adam_step"] == state["schedule_step"] == 4
    for name, master in masters.items():
        torch.testing.assert_close(state["parameters"][name]["master"], master.detach().cpu(), rtol=1e-4, atol=2e-5)


def test_bf16_zero2_keeps_fp32_masters_and_sums(ranks, tmp_path):
    settings = toy.config(tmp_path, gradient_accumulation_steps=4)
    masters, _ = plain_training(settings, ranks, steps=3)
    ds_engine = toy.build(settings, ranks)
    toy.train(ds_engine, settings, ranks, range(3))
    weights, state = engine.trainable_state(ds_engine), engine.training_tensors(ds_engine)["parameters"]
    for name, master in masters.items():
        assert weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(state[name]["master"], master.detach().cpu(), rtol=1e-4, atol=2e-5)
        assert torch.equal(state[name]["master"].bfloat16(), weights[name])
    assert ds_engine.model.offset.dtype == torch.float32, "buffers such as rotary frequencies must stay fp32"


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_parameter_without_gradient_counts_as_zero(ranks, tmp_path, stage, offload):
    settings = toy.config(tmp_path, stage, offload, weight_decay=0.0)
    ds_engine = toy.build(settings, ranks)
    start = engine.training_tensors(ds_engine)["parameters"]["idle.weight"]
    toy.train(ds_engine, settings, ranks, range(1, 2))  # an odd step: `idle` is not used
    unused = engine.training_tensors(ds_engine)["parameters"]["idle.weight"]
    assert torch.equal(start["master"], unused["master"])
    assert unused["exp_avg"].count_nonzero() == 0
    toy.train(ds_engine, settings, ranks, range(2, 3))
    used = engine.training_tensors(ds_engine)["parameters"]["idle.weight"]
    assert used["exp_avg"].count_nonzero() > 0
    toy.train(ds_engine, settings, ranks, range(3, 4))
    later = engine.training_tensors(ds_engine)["parameters"]["idle.weight"]
    torch.testing.assert_close(later["exp_avg"], 0.9 * used["exp_avg"])  # no gradient of an earlier step again


def test_shipped_offload_trains(ranks):
    settings = TrainConfig(deepspeed_config="zero2_offload")
    ds_engine = toy.build(settings, ranks)
    first, *_, last = toy.train(ds_engine, settings, ranks, range(3))
    assert last < first


def test_no_timer_waits_for_the_device(ranks, tmp_path):
    ds_engine = toy.build(toy.config(tmp_path), ranks)
    assert not ds_engine.deepspeed.tput_timer.config.enabled
    assert not ds_engine.deepspeed.wall_clock_breakdown()


def test_a_parameter_outside_the_groups_is_refused(ranks, tmp_path):
    model = toy.Toy(dropout=0.0)
    with pytest.raises(AssertionError, match="every trainable parameter once"):
        engine.initialize(model, toy.param_groups(model)[:1], toy.config(tmp_path), ranks, total_steps=1)


def test_set_schedule_step_is_where_that_many_steps_lead(ranks, tmp_path):
    settings = toy.config(tmp_path)
    trained, moved = toy.build(settings, ranks), toy.build(settings, ranks)
    toy.train(trained, settings, ranks, range(3))
    engine.set_schedule_step(moved, 3)
    assert moved.learning_rate() == trained.learning_rate()
    assert moved.deepspeed.get_lr() == trained.deepspeed.get_lr()


# Losses and gradients that are not finite


def test_watch_reports_the_first_bad_step_only_when_asked(ranks):
    config, watch = TrainConfig(), FiniteWatch(ranks.device)
    fine, bad = (torch.tensor(value, device=ranks.device) for value in (1.0, float("nan")))
    watch.update(fine, None, 1)
    watch.update(fine, torch.tensor(3.0), 2)
    watch.check(config)
    watch.update(fine, float("inf"), 3)
    watch.update(bad, torch.tensor(3.0), 4)
    watch.update(fine, torch.tensor(3.0), 5)
    with pytest.raises(DivergedError, match=r"^step 3: .*learning_rate \(now 0.0001\)"):
        watch.check(config)


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (2, "fp32"), (3, "bf16")])
def test_an_infinite_gradient_is_seen_and_never_saved(ranks, tmp_path, stage, precision):
    settings = toy.config(tmp_path, stage, precision=precision, gradient_accumulation_steps=1)
    ds_engine, watch = toy.build(settings, ranks), FiniteWatch(ranks.device)
    loss = ds_engine(toy.tokens(0, 0, ranks, 2), 0)
    ds_engine.backward(loss * float("inf"))
    ds_engine.step()
    watch.update(loss, ds_engine.gradient_norm(), 1)  # the loss itself is finite
    with pytest.raises(DivergedError, match="^step 1"):
        watch.check(settings)
    if any(not weight.isfinite().all() for weight in ds_engine.model.parameters()):
        for gather in (engine.trainable_state, engine.training_tensors):
            with pytest.raises(DivergedError, match="not written"):
                gather(ds_engine)
