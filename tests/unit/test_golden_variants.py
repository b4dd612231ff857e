"""`doctor --golden` on files of other sizes and T5 variants, recorded by a second, plain way of computing the step.

The recorder below goes task by task and example by example through T5's own forward, straight from the
formulas; it shares no code with the package but the reading side.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from supmer_ray.golden import TOLERANCE, differences, load_golden


def encode(model, prompt, ids):
    embeddings = torch.cat([prompt, model.shared(ids)])[None]
    return model.encoder(inputs_embeds=embeddings).last_hidden_state


def answer(model, states, decoder_ids):
    return model(encoder_outputs=(states,), decoder_input_ids=decoder_ids[None]).logits[0].log_softmax(-1)


def transform(phi, g):
    u = g
    for i in (0, 1):
        u = torch.relu((phi[f"layers.{i}.u"] @ (phi[f"layers.{i}.v"] @ u.T)).T + phi[f"layers.{i}.bias"])
    return u / (u.norm(dim=1, keepdim=True) + 1e-8) * (g.norm(dim=1, keepdim=True) + 1e-8)


def record(model, prompt, phi, centroids, task, rate):
    """Everything that the golden layout records of one task."""
    support, query, partner, lam, (own, other) = task
    theta = prompt.clone().requires_grad_()
    losses, states = [], []
    for ids, read, says in zip(*support, strict=True):
        h = encode(model, theta, ids)
        states.append(h[0].detach())
        losses.append(-answer(model, h, read)[range(3), says].sum())
    (g,) = torch.autograd.grad(torch.stack(losses).mean(), theta)
    h = torch.cat(states).mean(0)
    phi = {name: value.clone().requires_grad_() for name, value in phi.items()}
    hidden = torch.relu(phi["linear_1.weight"] @ h + phi["linear_1.bias"])
    z = torch.sigmoid(phi["linear_2.weight"] @ hidden + phi["linear_2.bias"])
    psi = (1 - z) * transform(phi, g) + z * g
    theta = prompt.clone().requires_grad_()
    adapted = theta - rate * psi
    losses = []
    for i in range(len(lam)):
        mixed = lam[i] * encode(model, adapted, query[0][i]) + (1 - lam[i]) * encode(model, adapted, partner[0][i])
        log_p = answer(model, mixed, query[1][i])[:2]
        target = lam[i] * F.one_hot(query[2][i][:2], log_p.shape[1]) + (1 - lam[i]) * F.one_hot(
            partner[2][i][:2], log_p.shape[1]
        )
        losses.append(F.kl_div(log_p, target, reduction="sum"))
    loss = torch.stack(losses).mean()
    gradient, *rest = torch.autograd.grad(loss, [theta, *phi.values()], retain_graph=True, allow_unused=True)
    s = (1 + F.cosine_similarity(gradient, psi.detach(), dim=1).mean()) / 2
    delta = (1 + F.cosine_similarity(centroids[own], centroids[other], dim=0)) / 2
    penalty = (delta / 2 + s / 2 - z) ** 2
    gate = torch.autograd.grad(penalty.sum(), list(phi.values()), allow_unused=True)
    total = [sum(part for part in pair if part is not None) for pair in zip(rest, gate, strict=True)]
    out = {"support_gradient": g, "encoder_mean": h, "regularized_gradient": psi.detach(), "gate": z.detach()}
    out["meta_gradient.prompt"] = gradient
    out |= {f"meta_gradient.regularizer.mlp.{name}": value for name, value in zip(phi, total, strict=True)}
    facts = {"query_kl": loss.item(), "domain_sim": delta.item(), "qs_sim": s.item(), "reg": penalty.item()}
    return out, {**facts, "domains": [own, other]}


def write_golden(folder, *, d_model, rank, prompt_length, tasks, **variant):
    """A golden file in the published layout; returns its path."""
    torch.manual_seed(d_model)
    config = T5Config(
        vocab_size=70, d_model=d_model, d_kv=8, d_ff=3 * d_model, num_layers=3, num_decoder_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **variant,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double().eval()

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    prompt, centroids, rate = normal(prompt_length, d_model), normal(2 * tasks, d_model), 0.2
    phi = {"linear_1.weight": normal(7, d_model) / 3, "linear_1.bias": normal(7)}
    phi |= {"linear_2.weight": normal(1, 7), "linear_2.bias": normal(1)}
    for i in (0, 1):
        phi |= {f"layers.{i}.u": normal(d_model, rank), f"layers.{i}.v": normal(rank, d_model)}
        phi |= {f"layers.{i}.bias": normal(d_model) / 5}

    def examples(count, length):
        says = torch.stack([torch.tensor([68, int(torch.randint(5, 9, ())), 69]) for _ in range(count)])
        reads = torch.cat([torch.zeros(count, 1, dtype=torch.long), says[:, :-1]], dim=1)
        return torch.randint(10, 60, (count, length)), reads, says

    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    tied |= {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {f"backbone.{k}": v.clone() for k, v in model.state_dict().items() if k not in tied}
    tensors |= {"prompt": prompt, "cluster_centroids": centroids}
    tensors |= {f"regularizer.mlp.{name}": value for name, value in phi.items()}
    per_task = []
    for number in range(tasks):
        sets = [examples(count, 9) for count in (3, 4, 4)]
        lam = torch.tensor([0.8, 0.8, 0.3, 0.3], dtype=torch.float64)
        out, facts = record(model, prompt, phi, centroids, (*sets, lam, (number, tasks + number)), rate)
        per_task.append(facts)
        tensors[f"task{number}.lambda"] = lam
        for name, (ids, reads, says) in zip(("support", "query", "partner"), sets, strict=True):
            at = f"task{number}.{name}."
            tensors |= {at + "input_ids": ids, at + "decoder_input_ids": reads, at + "labels": says}
        tensors |= {f"task{number}.out.{name}": value.detach().clone() for name, value in out.items()}
    file = folder / "golden.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    facts = {"d_model": d_model, "inner_lr": rate, "t5_config": config.to_dict(), "per_task": per_task}
    file.with_suffix(".json").write_text(json.dumps(facts, default=str))
    return file


@pytest.mark.parametrize(
    "variant",
    [
        {"d_model": 24, "rank": 5, "prompt_length": 4, "tasks": 2},
        {"d_model": 16, "rank": 16, "prompt_length": 9, "tasks": 1, "feed_forward_proj": "gated-gelu"},
        {
            "d_model": 40, "rank": 3, "prompt_length": 2, "tasks": 3, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        {"d_model": 16, "rank": 4, "prompt_length": 3, "tasks": 1, "feed_forward_proj": "gated-silu"},
    ],
)  # fmt: skip
def test_other_files_pass(tmp_path, variant):
    found = differences(load_golden(write_golden(tmp_path, **variant)))
    assert max(found.values()) < TOLERANCE, found
