"""One machine, many clients: the federated round, from the configuration to the ledger."""

from autoflip.fed.config import Config, ConfigError
from autoflip.fed.ledger import ClientRecord, Record
from autoflip.fed.loop import Result, resume, run
from autoflip.fed.server import RoundError

__all__ = ["ClientRecord", "Config", "ConfigError", "Record", "Result", "RoundError", "resume", "run"]
