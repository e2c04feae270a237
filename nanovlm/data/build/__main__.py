"""Make data sets.

    python -m nanovlm.data.build answer MODEL SOURCE OUT.jsonl        the questions of a source with a model's answers
    python -m nanovlm.data.build top-k MODEL SOURCE OUT.jsonl         its records with the tokens that a model expects
    python -m nanovlm.data.build reference MODEL SOURCE OUT.jsonl     its pairs with the log-probabilities by a model

SOURCE is what data.sources of train.py takes, and OUT.jsonl can be one. It appears once it is whole; a command that was
killed goes on when it is given again.
"""

import sys

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

from nanovlm.data.build import answer, reference, top_k
from nanovlm.errors import UserError

COMMANDS = {
    "answer": (answer.AnswerConfig, answer.main),
    "top-k": (top_k.TopKConfig, top_k.main),
    "reference": (reference.ReferenceConfig, reference.main),
}


def main(args: list[str]):
    """Run the command that the first argument names."""
    import tyro

    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return
    if args[0] not in COMMANDS:
        raise UserError(f"there is no command {args[0]!r}; there are {', '.join(COMMANDS)}")
    config, run = COMMANDS[args[0]]
    prog, style = f"python -m nanovlm.data.build {args[0]}", (tyro.conf.PositionalRequiredArgs,)
    run(tyro.cli(config, args=args[1:], prog=prog, description=run.__doc__, config=style))


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
