"""What run.sh needs beside the `megatron-vlm` commands: raw corpora, a kill, a comparison of logits, the bars."""
