"""What a person did wrong, said in one sentence, with exit status 2."""

import os
import sys
import time
from collections.abc import Callable

QUOTED = 300  # characters of somebody else's message at most
OTHER_RANKS_WAIT_S = 10  # for rank 0 to say it first; torchrun then ends them


class UserError(Exception):
    """The job can't be done as asked.

    The message is one sentence that names the option or file, what is wrong with it, and what to do.
    """


def one_line(error: Exception) -> str:
    """A library's error on one line, cut where it rambles, to quote within a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= QUOTED else f"{text[:QUOTED]} ...").rstrip(".")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a UserError is printed as one line and becomes exit status 2, and so does an OSError: no
    permission, no space left.

    Under torchrun every rank meets the same error, so rank 0 speaks for all. A rank that torchrun has not ended after
    OTHER_RANKS_WAIT_S is alone with its error (a file missing on its node, say) and speaks for itself.
    """
    try:
        main()
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", 0)) != 0:
            time.sleep(OTHER_RANKS_WAIT_S)
        sentence = error if isinstance(error, UserError) else one_line(error)
        print(f"{os.path.basename(sys.argv[0])}: error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
