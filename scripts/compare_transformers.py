"""Compares a model with transformers in float32 on real weights: greedy tokens and perplexity.

1. Answer prompts greedily; run transformers over prompt and answer and see, token by token, whether it would have chosen the same.
   Where it would not, print by how much its choice is ahead of ours: ties show as margins near nothing.
2. Take the perplexity of a text, in windows of --window tokens, from both.
3. Print one JSON line.

transformers loads the model by itself, a .gguf file by its own reader (which wants the accelerate package), so that ours is checked too.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxserve import LLM, SamplingParams


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Compare a model with transformers in float32.", allow_abbrev=False)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a .gguf file, or a directory of safetensors")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="of which to take the perplexity, and the beginnings of prompts")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens that are looked at together")
    parser.add_argument("--num-windows", type=int, default=32)
    args = parser.parse_args()
    llm = LLM(str(args.model), dtype="float32", max_rows=args.num_prompts, max_len=args.window + 1, max_step_tokens=args.window)
    reference = load_reference(args.model)
    ids = llm.tokenizer.encode(args.text.read_text("utf-8"), add_special_tokens=False)
    figures = {
        "model": args.model.name,
        "transformers": transformers.__version__,
        **compare_greedy(llm, reference, ids, args),
        **compare_perplexity(llm, reference, ids, args),
    }
    print(json.dumps(figures))


def load_reference(path: pathlib.Path) -> Any:
    """The model in transformers, float32."""
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    directory = path.parent if where else path
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **where).eval()


def compare_greedy(llm: LLM, reference: Any, ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Share of tokens chosen alike, and the margins of the others in logits."""
    first = llm.tokenizer.encode("", add_special_tokens=True)  # what the model wants to begin with, if anything
    starts = np.linspace(0, len(ids) - 64, args.num_prompts).astype(int)
    prompts = [first + ids[start : start + 8 + i % 24] for i, start in enumerate(starts)]
    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    results = llm.generate(prompts, params, use_tqdm=False)
    same, margins = 0, []
    for prompt, result in zip(prompts, results, strict=True):
        answer = torch.tensor(result.outputs[0].token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([*prompt, *answer.tolist()])[None]).logits[0, len(prompt) - 1 : -1]
        choice = logits.argmax(-1)
        same += int((choice == answer).sum())
        behind = logits.max(-1).values - logits.gather(1, answer[:, None])[:, 0]
        margins += [round(float(behind[i]), 6) for i in torch.nonzero(choice != answer).flatten()]
    return {"greedy_tokens": args.num_prompts * args.output_len, "greedy_same": same, "margins_of_others": margins}


def compare_perplexity(llm: LLM, reference: Any, ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the text's first windows, ours and theirs, and by how much they differ."""
    windows = [ids[i * args.window : (i + 1) * args.window] for i in range(args.num_windows)]
    windows = [window for window in windows if len(window) == args.window]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    ours: list[float] = []
    for result in llm.generate(windows, params, use_tqdm=False):
        assert result.prompt_logprobs is not None
        ours += [next(iter(position.values())).logprob for position in result.prompt_logprobs if position is not None]
    theirs: list[float] = []
    for window in windows:
        with torch.no_grad():
            logprobs = torch.log_softmax(reference(torch.tensor(window)[None]).logits[0, :-1].float(), -1)
        theirs += logprobs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].tolist()
    assert len(ours) == len(theirs), f"{len(ours)=} {len(theirs)=}"
    mine, other = (math.exp(-float(np.mean(values))) for values in (ours, theirs))
    return {"perplexity_tokens": len(ours), "perplexity": round(mine, 4), "perplexity_transformers": round(other, 4),
            "difference": abs(mine / other - 1)}  # fmt: skip


if __name__ == "__main__":
    main()
