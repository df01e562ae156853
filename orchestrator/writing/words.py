"""The words of the command line for what the functions beneath say in those of Python."""

from collections.abc import Iterator
from contextlib import contextmanager

FOR_THE_COMMAND = {
    'past_context="slide"': "--past_context slide",
    "with use_cache=False": "with --no_cache",
    "pass the folder that save_pretrained() wrote": "--model takes the folder of a run, or one with config.json",
    'pass the cfg dict too, as in GPTModel.from_pretrained(FILE, from_preset("gpt2"))': "--model takes the folder "
    "that holds the file and its config.json",
    ", or None, got": ", or none, got",
    "logprobs must be None or 0": "logprobs must be none, or 0",
    " (tokenizer.end_of_text is one)": "",
}
IN_A_CONVERSATION = {**FOR_THE_COMMAND, 'past_context="slide"': "/set past_context slide"}


@contextmanager
def in_words_of_the_command(conversation: bool = False) -> Iterator[None]:
    """Errors that leave this block speak of options, not of arguments. conversation: of /set."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = translated(str(error), conversation)
        if type(error) not in (ValueError, TypeError, FileNotFoundError) or said == str(error):
            raise
        raise type(error)(said) from error


def translated(message: str, conversation: bool = False) -> str:
    for python, here in (IN_A_CONVERSATION if conversation else FOR_THE_COMMAND).items():
        message = message.replace(python, here)
    return message
