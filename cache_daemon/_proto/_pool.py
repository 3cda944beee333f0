"""The descriptor pool of our generated messages, apart from the process-wide default."""

from google.protobuf.descriptor_pool import DescriptorPool

__all__ = ["POOL"]

POOL = DescriptorPool()
