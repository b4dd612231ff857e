"""Full fine-tuning: every weight of the language model learns from the K examples a class, without a prompt.

The same run goes in as for prompt tuning (its draw, its order of examples), and the step is chosen on the
dev split in the same way; what comes out is a language model of its own for each run.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from supmer_ray.config import AdaptConfig
from supmer_ray.fewshot.adapt import AdaptRun, Evaluation, judged, score, training_batches
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.prompted import encode_prompted, label_losses, micro_batches
from supmer_ray.tasks.collate import collate


def finetune(
    backbone: Backbone, run: AdaptRun, config: AdaptConfig, *, token_budget: int | None = None
) -> tuple[Backbone, Evaluation]:
    """Tune a copy of the language model in single precision and keep its best step.

    Args:
        run: its prompt has no rows and its regularizer is not asked.
        config: `rate` is AdamW's rate of all weights; dropout stays off, as in prompt tuning.

    Returns:
        The tuned model, and the dev evaluation that chose it; step 0 is the model as it was.
    """
    model = copy.deepcopy(backbone.model).float()
    share = backbone.gpu_share
    tuned = Backbone(model, backbone.tokenizer, backbone.name, LibraryForward(model), gpu_share=share)
    tuned.model.requires_grad_(True)
    weights = [weight for weight in tuned.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=config.weight_decay, fused=True)
    batches, examples = training_batches(run, config.batch), run.train.examples
    prompt = run.prompt[None].to(tuned.device)

    def evaluate(step: int) -> Evaluation:
        [scores] = score(tuned, prompt, [run.dev.examples], [run.verbalizer_ids], token_budget=token_budget)
        return Evaluation(step, *judged(run.dev, scores))

    best, kept = evaluate(0), _weights(tuned)
    for step in range(1, config.steps + 1):
        drawn = next(batches)
        for part in micro_batches(examples.lengths[drawn], prompt.shape[1], token_budget or tuned.token_budget):
            rows = collate(tuned, examples, drawn[part])
            states, layout = encode_prompted(tuned, prompt, rows)
            losses = label_losses(tuned, states, layout, rows, answers_only=config.loss == "answers")
            (losses.sum() / len(drawn)).backward()
        nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % config.evaluate_every == 0 or step == config.steps:
            found = evaluate(step)
            if found.beats(best):
                best, kept = found, _weights(tuned)
    tuned.model.load_state_dict(kept, strict=False)
    # What is only read from here on may take the fastest forward, for which weights are constants.
    return Backbone(model, backbone.tokenizer, backbone.name, gpu_share=share), best


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    # Not the state dict, which has a tied table under each of its names.
    return {name: value.detach().clone() for name, value in backbone.model.named_parameters()}
