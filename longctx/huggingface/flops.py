"""The FLOPs that MFU counts."""


def forward_flops(config, n_parameters: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of one row's forward pass: with attention counted whole, and by half as causal attention needs.

    The first is the reference's count, 2 * (parameters * l + 2 * layers * hidden * l ** 2); a step is three times that.
    """
    dense = 2.0 * n_parameters * sequence_length
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * sequence_length**2
    return dense + attention, dense + attention / 2
