"""Errors a user can cause. Read next: `cli.py`, which prints them in one line.

Every message names the file or key, what was found, what was expected and the
remedy. The programs print it without a stack trace and exit with status 2.
"""


class UserError(Exception):
  """A mistake outside the program: a bad key, file, checkpoint or setting."""


class ConfigError(UserError):
  """A configuration key is unknown, has a wrong type or a useless value."""


class DataError(UserError):
  """A data set, an image, a record or a tokenizer cannot be used."""


class CheckpointError(UserError):
  """A checkpoint is missing, incomplete or belongs to another model."""


class CacheError(UserError):
  """Compressed images are damaged or cannot be used with this model."""


class WeightsError(UserError):
  """Published weights are incomplete, damaged or of a model we cannot hold."""
