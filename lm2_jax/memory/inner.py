"""Old import path of `lm2_jax.ops.ttt_chunk.networks`."""

from lm2_jax.ops.ttt_chunk.networks import (
    HuberLoss as HuberLoss,
)
from lm2_jax.ops.ttt_chunk.networks import (
    InnerLoss as InnerLoss,
)
from lm2_jax.ops.ttt_chunk.networks import (
    InnerNetwork as InnerNetwork,
)
from lm2_jax.ops.ttt_chunk.networks import (
    LinearNetwork as LinearNetwork,
)
from lm2_jax.ops.ttt_chunk.networks import (
    MlpNetwork as MlpNetwork,
)
from lm2_jax.ops.ttt_chunk.networks import (
    NormWeights as NormWeights,
)
from lm2_jax.ops.ttt_chunk.networks import (
    PowerLoss as PowerLoss,
)
from lm2_jax.ops.ttt_chunk.networks import (
    SquaredError as SquaredError,
)
from lm2_jax.ops.ttt_chunk.networks import (
    SwigluNetwork as SwigluNetwork,
)
from lm2_jax.ops.ttt_chunk.networks import (
    Weights as Weights,
)
