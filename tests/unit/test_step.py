"""The meta-step on a tiny T5: padding, micro-batches, mixing, both orders, and what validation counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from supmer_ray.meta.step import MetaStep, mixed_states
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.packed import Layout
from supmer_ray.model.prompted import Rows, encode_prompted
from supmer_ray.model.regularizer import IdentityRegularizer, Regularizer
from supmer_ray.tasks.batch import Examples, TaskBatch
from supmer_ray.tasks.collate import collate

VOCABULARY, WIDTH, PROMPT = 60, 16, 3
SENTINEL, CLOSING = 58, 59


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.1,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    own = Backbone(T5ForConditionalGeneration(config).double(), None, "tiny")
    own.pad = 0
    return own


@pytest.fixture(scope="module")
def exact_backbone():
    """A BART: every operation of it is float64, where T5 takes a norm in float32, too coarse for differences."""
    torch.manual_seed(3)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        init_std=0.3, decoder_start_token_id=0, pad_token_id=0, bos_token_id=1, eos_token_id=CLOSING,
        forced_eos_token_id=None,
    )  # fmt: skip
    own = Backbone(BartForConditionalGeneration(config).double(), None, "tiny-bart")
    own.pad = 0
    return own


@pytest.fixture
def regularizer():
    torch.manual_seed(4)
    return Regularizer(WIDTH, rank=5, gate_hidden=6).double()


def examples(generator, tasks, each, longest=9, vectors=False, words=(10, 11, 12)):
    parts = []
    for _ in range(tasks):
        inputs = [generator.integers(2, 58, generator.integers(2, longest)).tolist() for _ in range(each)]
        if vectors:
            inputs = [[-1 - int(generator.integers(2)), *ids] for ids in inputs]
        labels = [[SENTINEL, int(generator.choice(words)), CLOSING] for _ in range(each)]
        parts.append(Examples.of(inputs, labels, generator.normal(size=(2, WIDTH)) if vectors else None, words))
    return Examples.concat(parts)


def make_batch(seed=0, tasks=3, vectors=False):
    generator = np.random.default_rng(seed)
    # Answers of the partner: one that the task has too, and one of its own.
    answers = [(10, 11, 12), (10, 11, 12), (12, 13)]
    sets = [
        examples(generator, tasks, each, vectors=vectors, words=words)
        for each, words in zip((4, 6, 6), answers, strict=True)
    ]
    return TaskBatch(*sets, generator.random(tasks), ["nsp"] * tasks)


def make_prompt(seed=5):
    return torch.randn(PROMPT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


RATES = torch.tensor([0.4], dtype=torch.float64)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("token_budget", [1, 40, 100])
def test_micro_batches_give_the_gradient_of_one_batch(backbone, regularizer, token_budget, vectors):
    batch = make_batch(vectors=vectors)
    mixing = np.repeat([1.0, 0.3, 0.8], 6)
    whole = MetaStep(backbone, regularizer, token_budget=1 << 20)(make_prompt(), RATES, batch, mixing)
    cut = MetaStep(backbone, regularizer, token_budget=token_budget)(make_prompt(), RATES, batch, mixing)
    torch.testing.assert_close(cut.prompt, whole.prompt, rtol=1e-7, atol=1e-10)
    for name, value in whole.tasks.items():
        torch.testing.assert_close(cut.tasks[name], value, rtol=1e-7, atol=1e-10)


def test_several_tasks_give_the_sum_of_each_alone(backbone, regularizer):
    step, prompt = MetaStep(backbone, regularizer), make_prompt()
    batches = [make_batch(seed, tasks=1) for seed in (1, 2, 3)]
    mixing = np.full(6, 0.7)
    together = step(prompt, RATES, TaskBatch.concat(batches), np.tile(mixing, 3))
    alone = [step(prompt, RATES, batch, mixing) for batch in batches]
    torch.testing.assert_close(together.prompt, sum(one.prompt for one in alone), rtol=1e-9, atol=1e-12)
    for number, gradient in enumerate(together.regularizer):
        torch.testing.assert_close(gradient, sum(one.regularizer[number] for one in alone), rtol=1e-9, atol=1e-12)


def test_padding_does_not_reach_the_task_embedding(backbone, regularizer):
    """h of a short example is the same beside a long one: it reads real positions only."""
    step, prompt = MetaStep(backbone, regularizer), make_prompt()
    short, long = make_batch(1, tasks=1), make_batch(2, tasks=1)
    long = replace(long, support=Examples.of([list(range(2, 40))] * 4, long.support.labels))
    mixing = np.ones(6)
    alone = step(prompt, RATES, short, mixing).task_embedding[0]
    beside = step(prompt, RATES, TaskBatch.concat([short, long]), np.ones(12)).task_embedding[0]
    torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-12)


def test_a_query_that_is_not_mixed_never_sees_its_partner(backbone, regularizer):
    step, prompt, batch = MetaStep(backbone, regularizer), make_prompt(), make_batch()
    other = replace(batch, partner=make_batch(9).partner)
    found, same = (step(prompt, RATES, b, np.ones(18)) for b in (batch, other))
    torch.testing.assert_close(found.prompt, same.prompt, rtol=0, atol=0)
    mixed, changed = (step(prompt, RATES, b, np.full(18, 0.5)) for b in (batch, other))
    assert (mixed.prompt - changed.prompt).abs().max() > 1e-6


def meta_loss(step, prompt, rates, batch, mixing):
    """Σ_τ L, evaluated by walking the inner steps, for finite differences."""
    return float(step(prompt, rates, batch, mixing).tasks["query_loss"].sum())


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_second_order_gradients_agree_with_finite_differences(exact_backbone, regularizer, inner_steps):
    # h is detached by definition, so the gate must not depend on it where θ is varied by hand.
    torch.nn.init.zeros_(regularizer.gate_out.weight)
    step = MetaStep(exact_backbone, regularizer, second_order=True)
    prompt, batch, mixing = make_prompt(), make_batch(tasks=2), np.full(12, 0.6)
    rates = torch.full((inner_steps,), 0.4, dtype=torch.float64)
    found = step(prompt, rates, batch, mixing)
    small, generator = 1e-5, torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(prompt.shape, dtype=torch.float64, generator=generator)
        up, down = (meta_loss(step, prompt + sign * small * direction, rates, batch, mixing) for sign in (1, -1))
        assert (found.prompt * direction).sum().item() == pytest.approx((up - down) / (2 * small), rel=2e-5)
    for number in range(inner_steps):
        nudge = torch.zeros_like(rates)
        nudge[number] = small
        up, down = (meta_loss(step, prompt, rates + sign * nudge, batch, mixing) for sign in (1, -1))
        assert found.inner_rates[number].item() == pytest.approx((up - down) / (2 * small), rel=2e-5)


@pytest.mark.parametrize("second_order", [False, True])
def test_regularizer_gradients_agree_with_finite_differences(exact_backbone, regularizer, second_order):
    """∇_φ of L + R, R's with δ and s held fixed, is exact in both orders: one inner step sees φ once."""
    step = MetaStep(exact_backbone, regularizer, second_order=second_order)
    prompt, batch, mixing = make_prompt(), make_batch(tasks=2), np.full(12, 0.6)
    found = step(prompt, RATES, batch, mixing)
    target = batch.domain_similarity / 2 + found.tasks["similarity"].numpy() / 2

    def loss():
        now = step(prompt, RATES, batch, mixing).tasks
        return float(now["query_loss"].sum()) + float(((torch.as_tensor(target) - now["gate"]) ** 2).sum())

    small = 1e-5
    for parameter, gradient in zip(regularizer.parameters(), found.regularizer, strict=True):
        at = int(gradient.abs().argmax())
        entry = parameter.detach().view(-1)
        entry[at] += small
        up = loss()
        entry[at] -= 2 * small
        down = loss()
        entry[at] += small
        assert gradient.view(-1)[at].item() == pytest.approx((up - down) / (2 * small), rel=1e-4, abs=1e-9)


def test_the_orders_differ_and_agree_where_they_must(backbone, regularizer):
    prompt, batch, mixing = make_prompt(), make_batch(), np.full(18, 0.6)
    first, second = (
        MetaStep(backbone, regularizer, second_order=order)(prompt, RATES, batch, mixing) for order in (False, True)
    )
    assert (first.prompt - second.prompt).abs().max() > 1e-6
    for one, other in zip(first.regularizer, second.regularizer, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_without_psi_the_raw_gradient_is_applied(backbone):
    found = MetaStep(backbone, IdentityRegularizer())(make_prompt(), RATES, make_batch(), np.ones(18))
    assert found.regularizer == []
    torch.testing.assert_close(found.update, found.support_gradient)
    assert found.tasks["gate"].tolist() == [1, 1, 1]


def test_without_a_gate_the_transform_still_learns(backbone):
    torch.manual_seed(4)
    psi = Regularizer(WIDTH, rank=5, gated=False).double()
    found = MetaStep(backbone, psi)(make_prompt(), RATES, make_batch(), np.ones(18))
    assert found.tasks["gate"].tolist() == [0, 0, 0]
    assert len(found.regularizer) == 6 and all(bool(gradient.abs().sum() > 0) for gradient in found.regularizer)


def test_states_are_mixed_by_lambda_itself_and_not_by_what_bfloat16_makes_of_it():
    own, partner = torch.randn(2, 50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep = torch.full((50, 1), 0.997, dtype=torch.float64)  # in bfloat16 it is 0.996
    exact = 0.997 * own.double() + (1 - 0.997) * partner.double()
    mixed = mixed_states(own, partner, keep)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, exact.bfloat16())
    a, b, share = own.float(), partner.float(), keep.float()
    assert mixed_states(a, b, keep).equal(share * a + (1 - share) * b), "on float32, as it is"
    assert mixed_states(own.double(), partner.double(), keep).equal(exact)


def test_answers_alone_are_told_from_the_answers_of_both_tasks(backbone, regularizer):
    """λ·log p(own) + (1 − λ)·log p(partner's) among the answers of both, written out for each example."""
    step, batch, mixing = MetaStep(backbone, regularizer, answers_only=True), make_batch(tasks=2), np.full(12, 0.3)
    found = step(make_prompt(), RATES, batch, mixing)
    adapted = make_prompt() - RATES * found.update
    losses = torch.zeros(2, dtype=torch.float64)
    for i, task in enumerate(batch.query.task):
        width = max(batch.query.lengths[i], batch.partner.lengths[i])
        rows, partner = (
            collate(backbone, part, np.array([i]), widths=np.array([width])) for part in (batch.query, batch.partner)
        )
        both = [encode_prompted(backbone, adapted, part)[0] for part in (rows, partner)]
        union = Layout(rows.layout.widths, rows.layout.widths).behind(PROMPT)
        mixed = 0.3 * both[0] + 0.7 * both[1]
        logits = backbone.logits(mixed, union, rows.decoder_input_ids)[0, 1, [10, 11, 12, 13]]
        target = torch.zeros(4, dtype=torch.float64)
        target[int(rows.labels[0, 1]) - 10] += 0.3
        target[int(partner.labels[0, 1]) - 10] += 0.7
        divergence = torch.nn.functional.kl_div(logits.log_softmax(0), target, reduction="sum")
        losses[task] += divergence.detach() / 6
    torch.testing.assert_close(found.tasks["query_loss"], losses, rtol=1e-9, atol=1e-12)


def test_answers_alone_drive_the_inner_step(backbone, regularizer):
    batch, prompt = make_batch(tasks=1), make_prompt()
    found = MetaStep(backbone, regularizer, answers_only=True)(prompt, RATES, batch, np.ones(6))
    theta = prompt[None].clone().requires_grad_()
    rows = collate(backbone, batch.support, np.arange(4))
    logits = backbone.logits(*encode_prompted(backbone, theta, rows), rows.decoder_input_ids)[:, 1, 10:13]
    loss = torch.nn.functional.cross_entropy(logits, rows.labels[:, 1] - 10)
    torch.testing.assert_close(found.tasks["support_loss"][0], loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.support_gradient, torch.autograd.grad(loss, theta)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("answers_only", [False, True])
def test_validation_losses_are_the_unmixed_query_losses(backbone, regularizer, answers_only):
    step = MetaStep(backbone, regularizer, answers_only=answers_only, token_budget=60)
    prompt, batch = make_prompt(), make_batch()
    losses, _ = step.query_metrics(prompt, RATES, batch)
    trained = step(prompt, RATES, batch, np.ones(18)).tasks["query_loss"]
    torch.testing.assert_close(losses, trained, rtol=1e-7, atol=1e-10)


def test_without_inner_steps_the_prompt_learns_from_its_queries_alone(backbone, regularizer):
    """Pre-training without meta-learning: ∇_θ of the query loss at θ, whatever the support sets hold."""
    batch, prompt = make_batch(), make_prompt()
    step, alone = MetaStep(backbone, regularizer), np.ones(18)
    found = step(prompt, torch.zeros(0, dtype=torch.float64), batch, alone)
    # The same examples as support sets, without the closing word: their gradient at θ, once for each task.
    support = replace(batch.query, labels=batch.query.labels[:, :2])
    inner = step(prompt, RATES, replace(batch, support=support), alone)
    torch.testing.assert_close(found.prompt, inner.support_gradient.sum(dim=0), rtol=1e-8, atol=1e-12)
    assert all(not gradient.any() for gradient in found.regularizer)
    assert set(found.seconds()) == {"support", "query"}


def test_queries_and_partners_encoded_together_insert_their_own_vectors(backbone):
    batch = make_batch(vectors=True)
    prompts = make_prompt().expand(3, -1, -1)
    index = np.arange(len(batch.query))
    widths = np.maximum(batch.query.lengths, batch.partner.lengths)
    rows, partner = (collate(backbone, part, index, widths=widths) for part in (batch.query, batch.partner))
    together, _ = encode_prompted(backbone, prompts, Rows.concat(rows, partner))
    apart = [encode_prompted(backbone, prompts, part)[0] for part in (rows, partner)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-9, atol=1e-12)


def test_validation_counts_the_answers_that_outscore_the_others_of_their_task(exact_backbone, regularizer):
    """Written out for each example, on a model that does not answer all of them alike."""
    step, prompt, batch = MetaStep(exact_backbone, regularizer, token_budget=60), make_prompt(), make_batch()
    adapted = prompt - RATES[0] * step(prompt, RATES, batch, np.ones(18)).update
    hits, said = torch.zeros(3, dtype=torch.float64), set()
    for i, task in enumerate(batch.query.task):
        rows = collate(exact_backbone, batch.query, np.array([i]))
        states, layout = encode_prompted(exact_backbone, adapted, rows)
        logits = exact_backbone.logits(states, layout, rows.decoder_input_ids)[0, 1]
        best = max((10, 11, 12), key=lambda word: float(logits[word]))
        hits[task] += best == batch.query.labels[i, 1]
        said.add(best)
    assert len(said) > 1
    assert step.query_metrics(prompt, RATES, batch)[1].tolist() == pytest.approx((hits / 6).tolist())
