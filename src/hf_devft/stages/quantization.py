"""Read and rebuild bitsandbytes 4-bit parameters; every other parameter passes through unchanged."""

import torch


def dense(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values: dequantised where it is a loaded bitsandbytes `Params4bit`, else itself.

    Raises:
        ValueError: integers of another quantisation, which cannot be compared or added.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None and not parameter.is_floating_point():
        raise ValueError(
            f"the base has weights of {parameter.dtype}: only bitsandbytes 4-bit bases can be grouped by similarity "
            'and fused. Load it in 4 bits or unquantised, or use fusion="anchor" with another grouping.'
        )
    if state is None:
        return parameter
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    if getattr(state, "packing_format_for_cpu", False):
        # An evaluation on a CPU has repacked the weight for its kernels: back, as bitsandbytes does before it saves.
        parameter.data, parameter.quant_state = _convert_weight_packed_for_cpu_inverse(parameter.data, state)
    return dequantize_4bit(parameter.data, parameter.quant_state)


def like(values: torch.Tensor, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A frozen parameter that stores `values` as `parameter` stores its own: dtype, device, quantisation."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return torch.nn.Parameter(values.to(parameter.dtype), requires_grad=False)
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        values.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=parameter.quant_storage,
    ).to(parameter.device)
