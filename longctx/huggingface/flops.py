"""The FLOPs that MFU counts."""

from transformers import PreTrainedConfig


def forward_flops(config: PreTrainedConfig, n_parameters: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of one row's forward pass: with all of attention, and with the half of it that causal attention needs.

    The first is the convention of the reference program, 2 * (parameters * l + 2 * layers * hidden * l ** 2), so that
    MFU figures compare.
    """
    dense = 2.0 * n_parameters * sequence_length
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * sequence_length**2
    return dense + attention, dense + attention / 2
