"""What a model is and where adapters go, read from its structure."""

from peftcore.detect.architecture import Architecture, ExpertInfo, LinearInfo
from peftcore.detect.detection import detect

__all__ = ["Architecture", "ExpertInfo", "LinearInfo", "detect"]
