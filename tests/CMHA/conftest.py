"""What the tests of attention share: a fresh memory of choices and warnings, and an ear on the logger."""

import importlib
import logging

import pytest
from hypothesis import settings

choosing = importlib.import_module("CMHA.choosing.choose")  # `CMHA.choosing.choose` is the function of that name

settings.register_profile("attention", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("attention")


@pytest.fixture(autouse=True)
def fresh_choices():
    """Choices and warnings are remembered for the process: forget them, also those about fake implementations."""

    def forget():
        choosing.chosen_once.cache_clear()
        choosing._warned.clear()

    forget()
    yield
    forget()


@pytest.fixture
def messages():
    """What the logger "CMHA" says during the test: a list of log records."""
    records = []

    class Ear(logging.Handler):
        def emit(self, record):
            records.append(record)

    ear, logger = Ear(), logging.getLogger("CMHA")
    logger.addHandler(ear)
    yield records
    logger.removeHandler(ear)
