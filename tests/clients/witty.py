"""jaxserve.serve with a model of some wit: `python -m tests.clients.witty [options]`.

Everything is the real server, its constrained decoding included; but the tokens that are sampled are those of an answer from the table
below, so that clients whose tests ask for sense get it from a model that has none. What comes after the answer is the model's own.
"""

from __future__ import annotations

import re
import sys

from jaxserve import serve
from jaxserve.request import Request
from jaxserve.runner.runner import Pending, Runner, StepResult
from jaxserve.text.tokenizer import load_tokenizer
from tests.text.samples import write_calls

JOKE = '{"setup": "Why was the cat on the computer?", "punchline": "To keep an eye on the mouse."}'
PERSON = '{"name": "Ada Lovelace", "age": 36}'
# Of a whole prompt, the first that is found: what the model says, or the call it makes. A tool must have been offered.
ANSWERS: tuple[tuple[str, str | tuple[str, dict[str, object]]], ...] = (
    (r"\ntool:[^\n]*\nassistant:$", "That is all that I wanted to know."),
    (r"(?s)^Tools:.*\nJoke\n.*joke", ("Joke", {"setup": "Why?", "punchline": "Because."})),
    (r"(?s)^Tools:\n(\w*Person|final_result)\n.*Ada", ("", {"name": "Ada Lovelace", "age": 36})),
    (r"(?s)^Tools:.*magic_function_no_args\(\)", ("magic_function_no_args", {})),
    (r"(?s)^Tools:.*magic_function", ("magic_function", {"input": 3})),
    (r"(?s)^Tools:.*Pirate", ("greeting_generator", {"answer_style": "Pirate"})),
    (r"(?s)^Tools:.*3 \+ 4", ("my_adder_tool", {"a": 3, "b": 4})),
    (r"(?s)^Tools:.*weather in", ("get_weather", {"location": "San Francisco, CA"})),
    (r"(?s)^Tools:.*你好啊集团", ("unicode_customer", {"customer_name": "你好啊集团", "description": "technology"})),
    (r"(?s)^Tools:.*こんにちは株式会社", ("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "trade"})),
    (r"joke", JOKE),
    (r"Ada", PERSON),
    (r"", "Hello! How can I help you?"),
)


def answer(prompt: str) -> str:
    """What to say to a prompt as tool_chat.jinja prints it."""
    for pattern, said in ANSWERS:
        found = re.search(pattern, prompt)
        if found is not None:
            return said if isinstance(said, str) else write_calls("hermes", [(said[0] or found[1], said[1])])
    raise AssertionError("the last pattern is found everywhere")


def main() -> None:
    """Serve."""
    tokenizer = load_tokenizer(sys.argv[sys.argv.index("--model") + 1])
    collect = Runner.collect
    said: dict[str, list[int]] = {}

    def next_token(request: Request, sampled: int) -> int:
        if request.id not in said:
            prompt = tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
            said[request.id] = [*tokenizer.encode(answer(prompt), add_special_tokens=False), *tokenizer.eos_ids]
        place = len(request.output_ids)
        return said[request.id][place] if place < len(said[request.id]) else sampled

    def collect_wisely(runner: Runner, pending: Pending) -> StepResult:
        result = collect(runner, pending)
        for place, row in enumerate(pending.schedule.rows):
            if row.samples and row.request.finish_reason is None:
                result.tokens[place] = (next_token(row.request, result.tokens[place][0]),)
        return result

    Runner.collect = collect_wisely  # type: ignore[method-assign]
    serve.main()


if __name__ == "__main__":
    main()
