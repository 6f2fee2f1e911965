"""The quickstart, start to end: solve, start three agents, apply, generate, compare with one node, stop everything.

Runs the very commands that a user types, as processes of their own on loopback; `make demo` calls it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN = HERE / "run"
MODEL = HERE.parent / "models" / "tinymoe-demo"
BIN = Path(sys.executable).parent
NODES = ("gateway", "press", "oven")
PROMPTS = {"gateway": "def main(argv):\n    ", "oven": "User: I need a table for two at"}
TOKENS = 48


def main() -> int:
    """Run the demo; 0 if the cluster said what one node says."""
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    say("Cut the model's experts into records that can travel")
    command("agent", "prepare", MODEL, "-o", RUN / "store", "--dtype", "float32")
    say("Decide which expert lives where")
    command("planner", "solve", HERE / "topology.yaml", "-o", RUN / "plan.json")
    command("planner", "show", "-v", RUN / "plan.json")
    with ExitStack() as stack:
        say("Start a coordinator and three agents, each too small for the model")
        stack.enter_context(
            daemon("planner", "serve", HERE / "topology.yaml", "--journal", RUN / "coordinator.journal")
        )
        for node in NODES:
            stack.enter_context(daemon("agent", "run", "--config", HERE / f"{node}.yaml"))
        say("Bring the weights to where the plan wants them")
        command("planner", "apply", RUN / "plan.json")
        say("Ask the cluster")
        verdicts = [answers_equal(node, prompt) for node, prompt in PROMPTS.items()]
        say("What happened")
        command("planner", "status")
        command("planner", "counters", "-o", RUN / "counters.json")
        say("Plan again with what the agents counted")
        command("planner", "solve", HERE / "topology.yaml", "--counters", RUN / "counters.json",
                "--current", RUN / "plan.json", "-o", RUN / "plan2.json")  # fmt: skip
        say("Let attention move too: tokens may run where their experts are")
        command("planner", "solve", HERE / "topology.yaml", "--trunk", "move", "--solver", "pipeline-speed",
                "--current", RUN / "plan.json", "-o", RUN / "plan3.json")  # fmt: skip
        command("planner", "apply", RUN / "plan3.json")
        verdicts += [answers_equal(node, prompt) for node, prompt in PROMPTS.items()]
        command("planner", "status")
    say("Everything is stopped")
    return 0 if all(verdicts) else 1


def answers_equal(node: str, prompt: str) -> bool:
    """Print what the cluster answers at `node` and whether one node alone gives the same tokens."""
    arguments = ("--prompt", prompt, "--node", node, "--max-tokens", str(TOKENS))
    command("agent", "generate", *arguments, shown=("--prompt", repr(prompt), *arguments[2:]))
    answer = json.loads(output("agent", "generate", *arguments, "--json"))
    same = answer["tokens"] == one_node_tokens(prompt)
    print(f"identical to one node: {'yes' if same else 'NO'}  ({len(answer['tokens'])} tokens)", flush=True)
    return same


def one_node_tokens(prompt: str) -> list[int]:
    """Greedy tokens of the whole model in this process, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(MODEL)(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def say(what: str) -> None:
    """Announce the next step."""
    print(f"\n── {what}", flush=True)


def command(name: str, *arguments: object, shown: tuple[object, ...] | None = None) -> None:
    """Print a command as a user would type it and run it to its end."""
    words = as_typed(arguments)
    print("$", name, *(words if shown is None else (words[0], *shown)), flush=True)
    subprocess.run([BIN / name, *words], check=True)


def as_typed(arguments: tuple[object, ...]) -> list[str]:
    """Write arguments as a user in this directory would: paths relative to it."""
    return [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in arguments]


def output(name: str, *arguments: object) -> str:
    """Run a command to its end and return what it printed."""
    return subprocess.run([BIN / name, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def daemon(name: str, *arguments: object) -> Iterator[None]:
    """Keep a command running; stopped as with Ctrl-C, whatever happens inside."""
    print(
        "$", name, *(os.path.relpath(word) if isinstance(word, Path) else word for word in arguments), "&", flush=True
    )
    process = subprocess.Popen([BIN / name, *map(str, arguments)])
    try:
        time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"{name} ended at once with exit code {process.returncode}")
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
