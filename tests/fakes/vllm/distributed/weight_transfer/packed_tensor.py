from vllm.distributed.weight_transfer.nccl_common import WIRE


def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func) -> None:
    assert group is not None
    assert src == 0
    for item in iterator:
        WIRE.put(post_iter_func(item).clone())
