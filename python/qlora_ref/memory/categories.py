"""The rows of every memory report, in the order they are printed, and the phases in the order they happen."""

PACKED, LEVEL1, LEVEL2 = "packed weights", "constants, first level", "constants, second level"
PLAIN, EMBEDDINGS, SMALL = "weights not quantized", "embeddings and head", "norms and biases"
ADAPTERS, GRADIENTS, STATES = "adapters", "gradients", "optimizer states"
CHECKPOINTS, WORKING, LOGITS, SCRATCH = "checkpoints", "layer working set", "logits and loss", "dequantized weight"
TABLES = "rotary tables and batch"
CATEGORIES = (
    PACKED, LEVEL1, LEVEL2, PLAIN, EMBEDDINGS, SMALL, ADAPTERS, STATES, GRADIENTS,
    TABLES, CHECKPOINTS, WORKING, SCRATCH, LOGITS,
)  # fmt: skip

LOSS_FORWARD, LOSS_BACKWARD = "loss forward", "loss backward"
LAST_LAYER, FIRST_LAYER, STEP = "last layer backward", "first layer backward", "optimizer step"
PHASES = (LOSS_FORWARD, LOSS_BACKWARD, LAST_LAYER, FIRST_LAYER, STEP)
