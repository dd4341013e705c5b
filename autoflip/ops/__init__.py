"""The only door to the kernels: checks, dispatch, autograd, fake tensors and FLOP formulas, one file a family."""

# delta
from autoflip.ops import delta as delta

# masked_matmul
from autoflip.ops._masked_matmul import linear_step as linear_step

# masked_weight
from autoflip.ops._masked_weight import again as again
from autoflip.ops._masked_weight import channels_last as channels_last
from autoflip.ops._masked_weight import gradient_hook as gradient_hook
from autoflip.ops._masked_weight import looker as looker
from autoflip.ops._masked_weight import traced as traced

# masked_conv, conv_paths
from autoflip.ops.conv_paths import few_channels as few_channels

# rows dealt to samples
from autoflip.ops.deal import deal_draw as deal_draw
from autoflip.ops.deal import deal_rows as deal_rows
from autoflip.ops.deal import softmax_deal as softmax_deal

# grouped
from autoflip.ops.grouped import GroupedPack as GroupedPack
from autoflip.ops.grouped import grouped_linear as grouped_linear
from autoflip.ops.hessian import conv_pull_back as conv_pull_back
from autoflip.ops.hessian import conv_squares as conv_squares
from autoflip.ops.hessian import dense_pull_back as dense_pull_back
from autoflip.ops.hessian import factor_squares as factor_squares
from autoflip.ops.hessian import sequence_squares as sequence_squares
from autoflip.ops.hessian import squared_matmul as squared_matmul

# hessian
from autoflip.ops.look import all_finite as all_finite
from autoflip.ops.look import all_rows as all_rows

# lstm
from autoflip.ops.lstm import lstm_pull_back as lstm_pull_back
from autoflip.ops.lstm import lstm_states as lstm_states
from autoflip.ops.masked_conv import ConvPack as ConvPack
from autoflip.ops.masked_conv import conv_job as conv_job
from autoflip.ops.masked_conv import conv_step as conv_step
from autoflip.ops.masked_conv import conv_weight as conv_weight
from autoflip.ops.masked_conv import masked_conv2d as masked_conv2d
from autoflip.ops.masked_matmul import Pack as Pack
from autoflip.ops.masked_matmul import linear_job as linear_job
from autoflip.ops.masked_matmul import masked_linear as masked_linear
from autoflip.ops.masked_matmul import masked_matmul as masked_matmul
from autoflip.ops.masked_matmul import masked_weight as masked_weight
from autoflip.ops.masked_matmul import version_of as version_of
from autoflip.ops.masked_matmul import zero_pruned as zero_pruned

# both, narrow types
from autoflip.ops.narrow import narrow_conv2d as narrow_conv2d
from autoflip.ops.narrow import narrow_linear as narrow_linear

# recurrent
from autoflip.ops.recurrent import RecurrentPack as RecurrentPack
from autoflip.ops.recurrent import masked_recurrent as masked_recurrent
from autoflip.ops.recurrent import recurrent_here as recurrent_here

# signs
from autoflip.ops.signs import rademacher as rademacher

# softmax
from autoflip.ops.softmax import softmax_columns as softmax_columns
from autoflip.ops.softmax import softmax_draw as softmax_draw
from autoflip.ops.softmax import softmax_factor as softmax_factor
from autoflip.ops.softmax import softmax_pull_back as softmax_pull_back
from autoflip.ops.softmax import softmax_weight as softmax_weight
