"""llama.cpp's own server, which the package xllamacpp holds: python llama_cpp.py MODEL MMPROJ PORT."""

import sys
import time

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.port = sys.argv[1], sys.argv[2], int(sys.argv[3])
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 2048, 1, False, 1
params.cpuparams_batch.n_threads = 1
# By default attention is in float16, which alone moves log-probabilities by up to 0.025, more than float16 weights do.
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(60)
