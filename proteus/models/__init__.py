"""Teachers and students: encoders that map images to Features."""

from proteus.models.encoder import Encoder
from proteus.models.factory import create_model, load_checkpoint
from proteus.models.features import Features
from proteus.models.zoo import list_models

__all__ = ["Encoder", "Features", "create_model", "list_models", "load_checkpoint"]
