"""The child process of `memory`: run one method once and print the memory that it took.

`memory.memory_of` starts it and writes what to run to its standard input.
"""

from __future__ import annotations

import json
import sys

from colm_edge.bench.memory import CONTEXT, peak_memory
from colm_edge.bench.methods import Methods
from colm_edge.bench.peers import HighLevel
from colm_edge.bench.replay import Trace
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.pair import load


def main() -> None:
    """Run the method that standard input names; print this process's peak memory in MB."""
    task = json.load(sys.stdin)
    trace, name = Trace(**task["trace"]), task["name"]
    arguments = task["arguments"]
    if name == "expert-llama-cpp-python":
        options = ContextOptions(**{name: arguments[name] for name in CONTEXT})
        model = Model(arguments["expert"], arguments["n_gpu_layers_expert"])
        high_level = HighLevel(Session(model, options))
        high_level.run(trace.prompt, len(trace.tokens))
    else:
        with load(**arguments) as pair, Methods(pair, trace) as methods:
            # memory_of made the expert the base, so that only one model is loaded.
            methods.names["base" if name == "expert" else name]()
    print(json.dumps(peak_memory()))


if __name__ == "__main__":
    main()
