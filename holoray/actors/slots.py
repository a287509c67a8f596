from holoray.codecs.base import Codec


def is_stateful(codec: Codec) -> bool:
    return codec.name == "spectral"
