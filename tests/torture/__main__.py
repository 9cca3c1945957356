"""Runs all parts and prints what they counted: `make torture`, or PYTHONPATH=.:tests python -m tests.torture."""

import importlib
import pkgutil

import tests.torture
import train


def main() -> None:
    train.register_loss()
    names = sorted(part.name for part in pkgutil.iter_modules(tests.torture.__path__) if part.name != "__main__")
    print("| what | tries | outcome |\n| --- | ---: | --- |", flush=True)
    for name in names:
        for row in importlib.import_module(f"tests.torture.{name}").main(quick=False):
            print(f"| {row.what} | {row.tries:,} | {row.outcome} |", flush=True)


if __name__ == "__main__":
    main()
