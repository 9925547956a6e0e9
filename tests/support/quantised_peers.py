"""gptqmodel's own packing and unpacking, as a script in an environment that has it.

    python tests/support/quantised_peers.py INPUT OUTPUT

`INPUT` has the levels of a matrix, uint8[out, in], as `values`, and as `gemm` what we packed it to; `OUTPUT` gets
`tinychat`, the levels as gptqmodel packs them, and `weight`, float[in, out], what it dequantises.
"""

import sys

import torch
from gptqmodel.nn_modules.qlinear.gemv_fast_awq import pack_intweight
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm


def main() -> None:
    """Pack and unpack."""
    given = torch.load(sys.argv[1])
    packed = [given["gemm"][name] for name in ("qweight", "qzeros", "scales")]
    weight = dequantize_gemm(*packed, 4, given["group_size"])
    tinychat = pack_intweight(given["values"].int(), interleave=4, kstride=64)
    torch.save({"tinychat": tinychat, "weight": weight}, sys.argv[2])


if __name__ == "__main__":
    main()
