"""Speeds of devices, as their makers state them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device: dense bfloat16 matrix rate in FLOP/s, memory bandwidth in bytes/s, memory in bytes."""

    name: str
    matrix_flops: float
    memory_bandwidth: float
    memory_bytes: float


# Sources: NVIDIA's H100 SXM, H200, A100 80GB SXM and B200 (HGX) datasheets; AMD's Instinct MI300X datasheet.
# Matrix rates are dense: the datasheets' headline numbers for sparsity are twice these.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 989e12, 3.35e12, 80e9),
        Hardware("h200", 989e12, 4.8e12, 141e9),
        Hardware("a100", 312e12, 2.039e12, 80e9),
        Hardware("b200", 2250e12, 8.0e12, 180e9),
        Hardware("mi300x", 1307e12, 5.3e12, 192e9),
    )
}


def identify(device_name: str) -> Hardware | None:
    """The table's entry for a device's name ('NVIDIA H100 80GB HBM3'), or None."""
    return next((hardware for name, hardware in HARDWARE.items() if name in device_name.lower()), None)
