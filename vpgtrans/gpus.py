"""GPU types: what they hold, how fast they are, what an hour of one costs. No torch here until a device is asked for.

Peaks are dense ones with float32 accumulation, from the makers' data sheets (which print twice as much "with
sparsity"). Memory is what torch reports as a device's total, a few per cent below what the name says. Bandwidths are of
the memory and, one way, of the link to the other GPUs of a machine: NVLink where there is one, else PCIe.
"""

import difflib
import re
from dataclasses import dataclass

from vpgtrans.errors import UserError

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """A type of GPU.

    Attributes:
        name: as `--gpus` takes it. memory: bytes. bf16, fp32: peak FLOP/s of matrix products; bf16 is None where there
        are none. bandwidth, link: bytes a second. price: US dollars an hour. devices: names that drivers report.
    """

    name: str
    memory: float
    bf16: float | None
    fp32: float
    bandwidth: float
    link: float
    price: float | None
    devices: tuple[str, ...]


def _gpu(
    name: str,
    memory: float,
    bf16: float | None,
    fp32: float,
    bandwidth: float,
    link: float,
    price: float,
    *devices: str,
) -> Gpu:
    """GiB, TFLOP/s, GB/s."""
    peak = None if bf16 is None else bf16 * TERA
    return Gpu(name, memory * GIB, peak, fp32 * TERA, bandwidth * GIGA, link * GIGA, price, devices)


# Prices are typical ones on demand in late 2025, of one GPU, rounded: Lambda (A100, H100, B200, V100), RunPod (L4,
# L40S, GeForce, H200, MI300X) and AWS (A10G: g5.xlarge, T4: g4dn.xlarge). They change: `--price` says another one.
# fp32 is that of CUDA cores: torch takes no TF32 unless it is told to.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 39.4, 312, 19.5, 1555, 300, 1.29, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        _gpu("A100-80GB", 79.2, 312, 19.5, 2039, 300, 1.79, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        _gpu("H100-80GB", 79.1, 989, 66.9, 3350, 450, 2.99, "NVIDIA H100 80GB HBM3"),
        _gpu("H100-PCIe-80GB", 79.1, 756, 51.2, 2000, 64, 2.49, "NVIDIA H100 PCIe"),
        _gpu("H200", 139.8, 989, 66.9, 4800, 450, 3.59, "NVIDIA H200"),
        _gpu("B200", 178.3, 2250, 75, 8000, 900, 4.99, "NVIDIA B200"),
        _gpu("L4", 22.0, 121, 30.3, 300, 32, 0.43, "NVIDIA L4"),
        _gpu("L40S", 44.4, 362, 91.6, 864, 32, 0.86, "NVIDIA L40S"),
        _gpu("A10G", 22.1, 70, 31.5, 600, 32, 1.01, "NVIDIA A10G"),
        _gpu("RTX3090", 23.6, 71, 35.6, 936, 32, 0.46, "NVIDIA GeForce RTX 3090"),
        _gpu("RTX4090", 23.6, 165, 82.6, 1008, 32, 0.69, "NVIDIA GeForce RTX 4090"),
        _gpu("RTX5090", 31.4, 209, 104.8, 1792, 64, 0.94, "NVIDIA GeForce RTX 5090"),
        # Without bf16: Turing and Volta.
        _gpu("T4", 14.6, None, 8.1, 320, 16, 0.53, "Tesla T4"),
        _gpu("V100-16GB", 15.8, None, 15.7, 900, 150, 0.55, "Tesla V100-SXM2-16GB"),
        _gpu("V100-32GB", 31.7, None, 15.7, 900, 150, 0.99, "Tesla V100-SXM2-32GB", "Tesla V100-SXM2-32GB-LS"),
        _gpu("MI300X", 192.0, 1307, 163.4, 5300, 448, 2.49, "AMD Instinct MI300X"),
    )
}


def find_gpu(name: str) -> Gpu:
    """The type of that name, whatever its case.

    Raises:
        UserError: there is none.
    """
    by_case = {known.casefold(): gpu for known, gpu in GPUS.items()}
    if (found := by_case.get(name.casefold())) is not None:
        return found
    begun = [key for key in by_case if key.startswith(f"{name.casefold()}-")]
    close = begun or difflib.get_close_matches(name.casefold(), by_case, n=1)
    meant = f"; did you mean {' or '.join(by_case[key].name for key in close)}?" if close else "."
    raise UserError(f"GPU type {name!r} is unknown{meant} Known types: {', '.join(GPUS)}")


@dataclass(frozen=True)
class Rented:
    """So many GPUs of a type in each of some machines; a type of None is the CPU here."""

    count: int
    gpu: Gpu | None
    nodes: int = 1

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"

    @property
    def devices(self) -> int:
        return self.count * self.nodes


def parse_gpus(text: str, *, nodes: int = 1) -> Rented:
    """`8xA100-40GB`, `A100-40GB` or `cpu`.

    Raises:
        UserError: it is none of these, or no such type is known.
    """
    found = re.fullmatch(r"(?:(\d{1,6})\s*[x×X*]\s*)?([A-Za-z].*)", text.strip())
    if found is None or int(found[1] or 1) == 0:
        raise UserError(f"--gpus {text}: right would be a number and a type such as 8xA100-40GB, or cpu")
    count, name = int(found[1] or 1), found[2]
    if name.casefold() == "cpu":
        if count * nodes > 1:
            raise UserError(f"--gpus {text}: cpu is this machine, of which there is one; right would be cpu")
        return Rented(1, None)
    return Rented(count, find_gpu(name), nodes)


def of_device(index: int) -> Gpu | None:
    """The type of a CUDA device of this machine by the exact name that its driver reports; None: it is not known."""
    import torch

    reported = torch.cuda.get_device_name(index)
    return next((gpu for gpu in GPUS.values() if reported in gpu.devices), None)
