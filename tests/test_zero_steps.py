"""Steps without DeepSpeed's detours: the same numbers as with them. One rank; two ranks are in test_checkpoint."""

from types import SimpleNamespace

import pytest
import torch
import toy

from sft import engine, zero_steps


def trained(settings, ranks):
    """Masters and the last norm after three steps."""
    ds_engine = toy.build(settings, ranks)
    toy.train(ds_engine, settings, ranks, range(3))
    state = engine.training_tensors(ds_engine)["parameters"]
    return {name: values["master"] for name, values in state.items()}, float(ds_engine.gradient_norm())


@pytest.mark.parametrize(("stage", "micro_batches", "most"), [(1, 1, 0.3), (2, 1, 0.3), (2, 1, 1e6), (2, 4, 0.3)])
def test_a_lightened_step_has_the_results_of_deepspeeds_own(ranks, tmp_path, monkeypatch, stage, micro_batches, most):
    settings = toy.config(tmp_path, stage, gradient_accumulation_steps=micro_batches, max_grad_norm=most)
    masters, norm = trained(settings, ranks)
    monkeypatch.setattr(zero_steps, "lighten", lambda *_: None)
    own_masters, own_norm = trained(settings, ranks)
    assert norm == pytest.approx(own_norm, rel=1e-6)
    for name, master in masters.items():
        torch.testing.assert_close(master, own_masters[name], rtol=1e-6, atol=1e-7)


def test_one_rank_sends_itself_no_gradients(ranks, tmp_path, monkeypatch):
    settings = toy.config(tmp_path, gradient_accumulation_steps=1)
    ds_engine, sent = toy.build(settings, ranks), []
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name, **__: sent.append(name))
    toy.train(ds_engine, settings, ranks, range(2))
    assert not sent


def test_a_norm_that_is_not_finite_stays_visible_and_moves_no_weight(ranks, tmp_path):
    settings = toy.config(tmp_path, gradient_accumulation_steps=1)
    zero = toy.build(settings, ranks).deepspeed.optimizer
    parts = [torch.tensor([3.0, 4.0]).bfloat16(), torch.tensor([12.0]).bfloat16()]
    assert float(zero.get_grad_norm_direct(parts, [])) == 13.0
    assert float(zero.get_grad_norm_direct([*parts, torch.tensor([torch.inf])], [])) == -1.0
    assert float(zero.get_grad_norm_direct([*parts, torch.tensor([torch.nan])], [])) == -1.0
    gradient = torch.tensor([1.0, -2.0])
    zero.unscale_and_clip_grads([gradient], torch.tensor(-1.0))
    assert not gradient.any()


@pytest.mark.parametrize(
    ("overlap_comm", "fp32_sums", "replaced"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_the_reduction_stays_where_it_does_more_than_reduce(ranks, overlap_comm, fp32_sums, replaced):
    """It also orders streams, or sums micro-batches."""
    group = torch.distributed.group.WORLD
    zero = SimpleNamespace(dp_process_group=group, bit16_groups=[[]], overlap_comm=overlap_comm)
    zero._use_compact_grad_partition_buffer = lambda number: fp32_sums
    zero_steps.lighten(zero, 1.0)
    assert hasattr(zero, "average_tensor") == replaced
