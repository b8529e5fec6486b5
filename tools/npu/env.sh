# Settings for Ascend 910B: `source tools/npu/env.sh` before Python starts. Paddle and its plug-in read them when they are
# imported, so later is too late. Only what is unset is set: your own values stay.

default() {  # default NAME VALUE
    eval "[ -n \"\${$1+x}\" ]" || export "$1=$2"
}

# Ascend's toolkit and its operator library put themselves on the search paths.
for script in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
    if [ -f "$script" ]; then . "$script"; fi
done
unset script

# Views of tensors: the plug-in has no strided kernels, and results are silently wrong with them. Checked by set_device().
default FLAGS_use_stride_kernel 0
# Keep tensors in Paddle's own layout. The private one (1) is faster for convolutions, of which there is one here, and
# needs a conversion before weights are saved.
default FLAGS_npu_storage_format 0
# Use operators that are already compiled; compiling one for every new shape takes minutes, and prompts differ in length.
default FLAGS_npu_jit_compile 0
# Kernels of the newer aclnn interface for scale and split.
default FLAGS_npu_scale_aclnn True
default FLAGS_npu_split_aclnn True
# Take memory as it is needed, rather than most of it at once.
default FLAGS_allocator_strategy auto_growth
# The plug-in's set_value kernels are sent to CPU, as PaddleMIX does for its models. Nothing here needs them.
default CUSTOM_DEVICE_BLACK_LIST set_value,set_value_with_tensor
# Compiled operators that are kept: batches of text come in many lengths.
default ASCEND_MAX_OP_CACHE_SIZE 5000
# Several cards: wait two hours for the others, which may still be reading weights; take any machine of the cluster.
default HCCL_CONNECT_TIMEOUT 7200
default HCCL_WHITELIST_DISABLE 1
default HCCL_SECURITY_MODE 1
# MB of each communication buffer.
default HCCL_BUFFSIZE 120

unset -f default

# For particular purposes, not set here:
#   ASCEND_RT_VISIBLE_DEVICES=0,1        cards that programs see, numbered from 0 in the order given
#   HCCL_INTRA_ROCE_ENABLE=1 HCCL_INTRA_PCIE_EHABLE=0   several machines over RoCE (the name is spelled so)
#   HCCL_DETERMINISTIC=true ACL_OP_DETERMINISTIC=true ACL_OPT_DETERMINISTIC=true npu_deterministic=true
#                                        the same numbers in every run, slower: for comparing losses
#   GLOG_v=3                             print each operator that falls back to CPU
#   FLAGS_enable_api_kernel_fallback=0   stop there instead
#   FLAGS_npu_check_nan_inf=1            stop at the first operator that gives NaN or infinity
#   FLAGS_npu_blocking_run=1             wait for each operator, so that an error names the right one
