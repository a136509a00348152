"""CUDA's autocast lists (``ATen/autocast_mode.h``), by the names that Python calls the functions.

Functions that PyTorch writes in Python are not here: their bodies run, and what they call is. Functions that C++ composes of listed ones,
out of Python's sight, are here under their own name.
"""

from __future__ import annotations

import torch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Whether layers of this kind have a kernel of their own on CUDA: with it came their place on the list.
FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm") and len(torch.ops.aten._fused_rms_norm.default._schema.returns) == 2

# Run in autocast's low dtype.
LOW = _names(
    """
    linear matmul __matmul__ __rmatmul__ mm mv bmm addmm addmv addr addbmm baddbmm einsum chain_matmul linalg_multi_dot linalg_vecdot prelu
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    """
)
# Run in fp32, their half-precision arguments copied.
FULL = _names(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal __rdiv__ __rtruediv__ rsqrt sinh tan
    pow __pow__ __rpow__ softplus layer_norm native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity
    poisson_nll_loss cosine_embedding_loss nll_loss nll_loss_nd nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss
    mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist _cdist pairwise_distance renorm logsumexp
    upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
    """
) | (_names("rms_norm") if FUSED_RMS_NORM else frozenset())
# Give fp32 and read half precision as it is: their argument ``dtype`` is set, nothing is copied before.
FULL_RESULT = _names("softmax log_softmax sum prod cumsum cumprod norm linalg_norm linalg_vector_norm linalg_matrix_norm")
# Run in the widest dtype among their floating-point arguments. ``cat`` and ``stack`` are not among them: they take mixed dtypes themselves.
WIDEST = _names("addcdiv addcmul atan2 bilinear cross linalg_cross dot vdot grid_sampler index_put tensordot scatter_add")
