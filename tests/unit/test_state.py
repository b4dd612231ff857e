"""Checkpoints: what is saved comes back to the last bit, and what is damaged or foreign is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ray.train import Checkpoint
from tiny import make_tiny_t5

from supmer_ray.config import load_run_config
from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.meta.curriculum import beta_scale, draw_mixing, running_similarity
from supmer_ray.meta.loop import restore
from supmer_ray.meta.run import snapshots_in
from supmer_ray.meta.state import MetaState, load_checkpoint
from supmer_ray.meta.step import MetaGradients
from supmer_ray.model.backbone import load_backbone

TEXTS = ["The quick brown fox jumps over the lazy dog.", "A sentence about markets, music and rain."] * 20
SETTINGS = ["prompt.length=4", "meta.steps=10"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(make_tiny_t5(tmp_path_factory.mktemp("t5"), TEXTS)))


def identity(backbone):
    return {"backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint}, "corpus": "c"}


def gradients(state, seed):
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        return torch.randn(tensor.shape, generator=generator)

    phi = [like(parameter) for parameter in state.regularizer.parameters()]
    rest = {"tasks": {}, "support_gradient": None, "update": None, "task_embedding": None}
    return MetaGradients(like(state.prompt), phi, like(state.log_rates), **rest)


def advance(state, steps):
    for _ in range(steps):
        found = gradients(state, state.progress.step)
        state.apply(found, state.gradient_norms(found))
        state.progress.step += 1


@pytest.mark.parametrize(
    "settings", [[], ["regularizer.enabled=false"], ["meta.inner_rate=0.2", "meta.learn_inner_rates=true"]]
)
def test_a_resumed_state_goes_on_bit_for_bit(backbone, tmp_path, settings):
    config = load_run_config(None, [*SETTINGS, *settings])
    whole = MetaState.fresh(config, backbone)
    advance(whole, 3)
    whole.save(tmp_path, identity(backbone))
    advance(whole, 4)
    resumed = MetaState.resume(tmp_path, config, backbone)
    assert resumed.progress.step == 3
    advance(resumed, 4)
    assert torch.equal(whole.prompt, resumed.prompt)
    assert torch.equal(whole.inner_rates(), resumed.inner_rates())
    for one, other in zip(whole.regularizer.parameters(), resumed.regularizer.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rates_decay_to_zero(backbone):
    state = MetaState.fresh(load_run_config(None, [*SETTINGS, "meta.prompt_rate=0.5"]), backbone)
    assert state.inner_rates().tolist() == [0.5]
    advance(state, 5)
    assert state.inner_rates().tolist() == pytest.approx([0.25])
    assert state.inner_rates(decayed=False).tolist() == [0.5]
    advance(state, 5)
    before = state.prompt.detach().clone()
    assert state.remaining == 0
    advance(state, 1)
    assert torch.equal(before, state.prompt)


def test_a_prompt_without_inner_steps_has_no_inner_rates(backbone):
    config = load_run_config(None, [*SETTINGS, "meta.inner_steps=0", "meta.inner_rate=[0.1, 0.2]"])
    assert MetaState.fresh(config, backbone).inner_rates().tolist() == []


def test_an_update_is_adam_on_each_group_clipped_for_itself_at_rates_that_decay(backbone):
    """Written out: once the prompt's gradient alone is long, once φ's."""
    settings = [*SETTINGS, "meta.clip=0.5", "meta.prompt_rate=0.3", "meta.regularizer_rate=0.01"]
    state = MetaState.fresh(load_run_config(None, settings), backbone)
    groups = [
        ([torch.nn.Parameter(parameter.detach().clone()) for parameter in group], rate)
        for group, rate in (([state.prompt], 0.3), (list(state.regularizer.parameters()), 0.01))
    ]
    optimizers = [torch.optim.Adam(group, lr=rate) for group, rate in groups]
    for step, scales in enumerate([(1e-3, 1e-6), (7.0, 1e-6), (1e-3, 1.0), (1e-3, 1e-6)]):
        raw = gradients(state, step)
        prompt, phi = raw.prompt * scales[0], [gradient * scales[1] for gradient in raw.regularizer]
        found = replace(raw, prompt=prompt, regularizer=phi)
        state.apply(found, state.gradient_norms(found))
        state.progress.step += 1
        for (group, rate), optimizer, own in zip(groups, optimizers, ([prompt], phi), strict=True):
            norm = torch.cat([gradient.flatten() for gradient in own]).norm()
            for parameter, gradient in zip(group, own, strict=True):
                parameter.grad = gradient * (0.5 / norm).clamp(max=1.0)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 10)  # of meta.steps=10
            optimizer.step()
        for (group, _), own in zip(groups, ([state.prompt], state.regularizer.parameters()), strict=True):
            for wanted, parameter in zip(group, own, strict=True):
                torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)


def test_learned_inner_rates_move_against_their_gradient(backbone):
    state = MetaState.fresh(
        load_run_config(None, [*SETTINGS, "meta.inner_rate=0.2", "meta.learn_inner_rates=true"]), backbone
    )
    found = gradients(state, 0)
    mean = MetaGradients(found.prompt, found.regularizer, torch.ones(1), {}, None, None, None)
    state.apply(mean, state.gradient_norms(mean))
    assert 0 < state.inner_rates().item() < 0.2


@pytest.fixture
def saved(backbone, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state = MetaState.fresh(load_run_config(None, SETTINGS), backbone)
    state.save(folder, identity(backbone))
    return folder


def test_a_damaged_file_is_named(saved, backbone):
    file = saved / "prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    with pytest.raises(UserError, match=r"prompt\.safetensors is damaged"):
        load_checkpoint(saved, backbone)
    file.unlink()
    with pytest.raises(UserError, match=r"prompt\.safetensors is missing"):
        load_checkpoint(saved, backbone)


def test_a_run_goes_on_with_the_text_it_began_with(saved, backbone):
    snapshots, config = [Checkpoint.from_directory(saved)], load_run_config(None, SETTINGS)
    state, damaged = restore(snapshots, config, backbone, "c")
    assert state.progress.step == 0 and not damaged
    with pytest.raises(UserError, match="The store holds another text than when this run was started"):
        restore(snapshots, config, backbone, "d")


def test_the_furthest_snapshot_comes_first_whatever_the_clock_said(tmp_path):
    """At 3 o'clock the clock was set back; and of one nothing can be read."""
    times = {"02-58-00.000001": 3, "02-10-00.000001": 6, "02-40-00.000001": None, "02-20-00.000001": 6}
    for time, step in times.items():
        folder = tmp_path / f"checkpoint_2026-10-25_{time}"
        folder.mkdir()
        if step is not None:
            (folder / "progress.json").write_text(json.dumps({"step": step}))
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    names = [snapshot.path.rpartition("_")[2][:5] for snapshot in snapshots_in(Place.of(tmp_path))]
    assert names == ["02-40", "02-20", "02-10", "02-58"], "the one that is damaged first, to be told of"


def test_what_is_no_checkpoint_is_refused(saved, backbone, tmp_path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "nothing", backbone)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(saved, backbone)


def test_another_backbone_or_prompt_length_is_refused(saved, backbone, tmp_path):
    other = load_backbone(str(make_tiny_t5(tmp_path / "other", ["entirely different words stand here"] * 9)))
    with pytest.raises(UserError, match="was made for the backbone"):
        load_checkpoint(saved, other)
    config = load_run_config(None, ["prompt.length=5", "meta.steps=10"])
    with pytest.raises(UserError, match=r"a prompt of 4 rows, but prompt\.length is 5"):
        MetaState.resume(saved, config, backbone)


def test_another_format_is_refused(saved, backbone):
    description = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99"):
        load_checkpoint(saved, backbone)


def test_curriculum():
    config = load_run_config(None).meta.curriculum
    assert beta_scale(0.0, 2.0) == pytest.approx(1e-7)
    assert beta_scale(1.0, 2.0) == pytest.approx(1.0)
    assert beta_scale(0.5, 16.0) == pytest.approx((4 - 1) / 15, rel=1e-5)
    assert {draw_mixing(config, 0.0, 0, index) for index in range(50)} == {1.0}
    late = [draw_mixing(config, 1.0, 0, index) for index in range(500)]
    assert 0.45 < sum(late) / 500 < 0.55, "Beta(1, 1) is uniform"
    middle = [draw_mixing(config, 0.5, 0, index) for index in range(500)]
    assert sum(late) < sum(middle) < 500, "the more alike the gradients, the more is mixed"
    assert draw_mixing(config, 0.7, 3, 5) == draw_mixing(config, 0.7, 3, 5)
    assert len({draw_mixing(config, 0.7, seed, index) for seed in (3, 4) for index in (5, 6)}) == 4
    off = load_run_config(None, ["meta.curriculum.enabled=false"]).meta.curriculum
    assert draw_mixing(off, 1.0, 0, 0) == 1.0
    plain = load_run_config(None, ["meta.curriculum.b=1.0000001"]).meta.curriculum
    assert [draw_mixing(plain, 0.0, 0, index) for index in range(500)] == late
    assert running_similarity(None, 0.6, 0.5) == 0.6
    assert running_similarity(0.2, 0.6, 0.25) == pytest.approx(0.3)
    narrow = load_run_config(None, ["meta.curriculum.a=4"]).meta.curriculum
    drawn = [draw_mixing(narrow, 1.0, 0, index) for index in range(500)]
    assert 0.45 < sum(drawn) / 500 < 0.55 and 0.13 < np.std(drawn) < 0.2, "Beta(4, 4), whose deviation is 1/6"


@pytest.mark.parametrize(
    "change",
    [{"backbone": "tiny"}, {"backbone": {}}, {"run": "abc"}, {"run": 5}, {"checksums": {}}],
    ids=["a name alone", "no name", "a text", "a number", "no prompt"],
)
def test_a_description_of_another_shape_is_damaged(saved, backbone, change):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=r"/checkpoint/config\.json is damaged; use another copy of it"):
        load_checkpoint(saved, backbone)


def test_another_version_comes_before_what_it_says(saved, backbone):
    (saved / "config.json").write_text('{"format": 9, "checksums": {}}')
    with pytest.raises(UserError, match=r"/checkpoint has checkpoint format 9; this version reads 1\.$"):
        load_checkpoint(saved, backbone)
