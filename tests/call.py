"""Call a function of a file with the rank: ``python call.py FILE FUNCTION ARGUMENTS``; `RANK` is in the environment."""

import importlib.util
import json
import os
import sys


def main(file, function, arguments):
    spec = importlib.util.spec_from_file_location("called", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, function)(int(os.environ["RANK"]), *json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
