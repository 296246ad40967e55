"""How pixels are prepared: preprocessor_config.json, or its like in processor_config.json."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.small_files import SmallFiles
from qconvert.errors import InputError
from qconvert.files.gguf_writer import GgufValue

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_BYTE = 1 / 255


@dataclass(frozen=True, slots=True)
class Pictures:
    """How pixels are prepared.

    Attributes:
        fields: of the file.
        mean, std: of red, green and blue from 0 to 1: what is subtracted and then divided by.
    """

    fields: Config
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def keys(self) -> dict[str, GgufValue]:
        """As llama.cpp reads them."""
        return {
            "clip.vision.image_mean": GgufValue("FLOAT32", list(self.mean)),
            "clip.vision.image_std": GgufValue("FLOAT32", list(self.std)),
        }


def read_pictures(files: SmallFiles) -> Pictures:
    """Read how pixels are prepared.

    Raises:
        InputError: there is no such file.
        FormatError: mean or deviation are none of three colours.
        UnsupportedError: pixels are prepared in another way than llama.cpp prepares them.
    """
    name, stated = PREPROCESSOR, files.json(PREPROCESSOR)
    inside = files.json(PROCESSOR) or {}
    if stated is None and isinstance(inside.get("image_processor"), dict):
        name, stated = PROCESSOR, inside["image_processor"]
    if stated is None:
        raise InputError(
            "how images are prepared is not known",
            path=files.home,
            found=f"no {PREPROCESSOR}, and no image_processor in a {PROCESSOR}",
            wanted="the model's mean and deviation of colours, image_mean and image_std",
            hint=f"download {PREPROCESSOR} of the model into its directory",
            code="ARCH-NO-PREPROCESSOR",
        )
    fields = Config(stated, files.home / name)
    for asked in ("do_normalize", "do_rescale", "do_resize", "do_convert_rgb"):
        fields.require(asked, (True, None), default=True)
    scale = fields.get("rescale_factor", _BYTE)
    if scale is not None and (type(scale) not in (int, float) or abs(scale - _BYTE) > 1e-9):
        raise fields.unlike("rescale_factor", f"1 / 255, {_BYTE}")
    mean = _colours(fields, "image_mean", zero=True)
    return Pictures(fields, mean, _colours(fields, "image_std", zero=False))


def _colours(fields: Config, name: str, *, zero: bool) -> tuple[float, ...]:
    """Three numbers from 0 to 1."""
    value = fields.get(name)
    wanted = f"three numbers from 0 to 1{'' if zero else ', none of them 0'}"
    if not isinstance(value, list) or len(value) != 3:
        raise fields.wrong(name, wanted)
    for each in value:
        least = 0 if zero else 1e-6
        if type(each) not in (int, float) or not least <= each <= 1:
            raise fields.wrong(name, wanted)
    return tuple(map(float, value))
