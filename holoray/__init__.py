"""holoray: progressive model warm-up. Encode a checkpoint once; load it usable early, exact at last.

    import holoray

    holoray.encode("model.safetensors", "store", dtype="bf16")
    weights = holoray.open("store").load(quality=0.999)
    with holoray.warm_up("store", workers=2, qualities=(0.99, 1.0)) as model:
        model.wait(0.99)
        weights = model.state_dict()

Names are resolved on first use: importing holoray loads neither Ray nor CuPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from holoray.version import __version__

if TYPE_CHECKING:
    from holoray.actors.accelerator import Accelerator as Accelerator
    from holoray.actors.placement import Placement as Placement
    from holoray.actors.published import SharedWeights as SharedWeights
    from holoray.actors.published import open_weights as open_weights
    from holoray.actors.warm_model import WarmModel as WarmModel
    from holoray.actors.warm_model import warm_up as warm_up
    from holoray.errors import CapacityError as CapacityError
    from holoray.errors import DeadlineError as DeadlineError
    from holoray.errors import FormatError as FormatError
    from holoray.errors import HolorayError as HolorayError
    from holoray.errors import IntegrityError as IntegrityError
    from holoray.errors import QualityError as QualityError
    from holoray.errors import SourceError as SourceError
    from holoray.errors import UsageError as UsageError
    from holoray.errors import WorkerLostError as WorkerLostError
    from holoray.fragment import Fragment as Fragment
    from holoray.fragment import FragmentEntry as FragmentEntry
    from holoray.fragment import TensorEntry as TensorEntry
    from holoray.manifest import Manifest as Manifest
    from holoray.pipelines.api import encode as encode
    from holoray.pipelines.api import open as open
    from holoray.pipelines.curve import CurvePoint as CurvePoint
    from holoray.pipelines.curve import QualityCurve as QualityCurve
    from holoray.pipelines.curve import curve_of as curve_of
    from holoray.pipelines.encode import EncodeReport as EncodeReport
    from holoray.pipelines.fault_policy import FaultPolicy as FaultPolicy
    from holoray.pipelines.open_sources import SourceSpec as SourceSpec
    from holoray.pipelines.open_sources import read_sources as read_sources
    from holoray.pipelines.plan import Target as Target
    from holoray.pipelines.repair import RepairReport as RepairReport
    from holoray.pipelines.repair import repair as repair
    from holoray.pipelines.sealed_store import SealedStore as SealedStore
    from holoray.pipelines.serve import StoreServer as StoreServer
    from holoray.pipelines.serve import serve as serve
    from holoray.pipelines.source_pool import SourcePool as SourcePool
    from holoray.pipelines.tensor_codec import TensorDecoder as TensorDecoder
    from holoray.pipelines.tensor_codec import encode_tensor as encode_tensor
    from holoray.quality import Quality as Quality
    from holoray.stores import Faults as Faults
    from holoray.stores import FaultySource as FaultySource
    from holoray.stores import FlightStore as FlightStore
    from holoray.stores import HttpStore as HttpStore
    from holoray.stores import LocalStore as LocalStore
    from holoray.stores import MemoryStore as MemoryStore
    from holoray.stores import RemoteStore as RemoteStore
    from holoray.stores import Shares as Shares
    from holoray.stores import ShareSet as ShareSet
    from holoray.stores import ShareTarget as ShareTarget
    from holoray.stores import Store as Store
    from holoray.stores import open_shares as open_shares
    from holoray.tensor import TensorSpec as TensorSpec

_HOMES: Final = {
    "Accelerator": "actors.accelerator",
    "CapacityError": "errors",
    "CurvePoint": "pipelines.curve",
    "DeadlineError": "errors",
    "EncodeReport": "pipelines.encode",
    "FaultPolicy": "pipelines.fault_policy",
    "Faults": "stores",
    "FaultySource": "stores",
    "FlightStore": "stores",
    "FormatError": "errors",
    "Fragment": "fragment",
    "FragmentEntry": "fragment",
    "HolorayError": "errors",
    "HttpStore": "stores",
    "IntegrityError": "errors",
    "LocalStore": "stores",
    "Manifest": "manifest",
    "MemoryStore": "stores",
    "Placement": "actors.placement",
    "Quality": "quality",
    "QualityCurve": "pipelines.curve",
    "QualityError": "errors",
    "RemoteStore": "stores",
    "RepairReport": "pipelines.repair",
    "SealedStore": "pipelines.sealed_store",
    "SourceError": "errors",
    "ShareSet": "stores",
    "ShareTarget": "stores",
    "SharedWeights": "actors.published",
    "Shares": "stores",
    "SourcePool": "pipelines.source_pool",
    "SourceSpec": "pipelines.open_sources",
    "Store": "stores",
    "StoreServer": "pipelines.serve",
    "Target": "pipelines.plan",
    "TensorDecoder": "pipelines.tensor_codec",
    "TensorEntry": "fragment",
    "TensorSpec": "tensor",
    "UsageError": "errors",
    "WarmModel": "actors.warm_model",
    "WorkerLostError": "errors",
    "curve_of": "pipelines.curve",
    "encode": "pipelines.api",
    "encode_tensor": "pipelines.tensor_codec",
    "open": "pipelines.api",
    "open_shares": "stores",
    "open_weights": "actors.published",
    "read_sources": "pipelines.open_sources",
    "repair": "pipelines.repair",
    "serve": "pipelines.serve",
    "warm_up": "actors.warm_model",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'holoray' has no attribute {name!r}")
    value = getattr(import_module(f"holoray.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
