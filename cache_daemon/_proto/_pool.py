"""A descriptor pool of our own, apart from the process-wide one."""

from google.protobuf.descriptor_pool import DescriptorPool

__all__ = ["POOL"]

POOL = DescriptorPool()
