"""Protocol buffer messages described in place: no generated code, no TensorFlow."""

from collections.abc import Sequence

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format


def message_classes(description: str) -> dict[str, type]:
    """The message classes by name of a FileDescriptorProto in text form, without a package.

    They live in a pool of their own: a TensorFlow in the same process does not collide with them.
    """
    file = text_format.Parse(description, descriptor_pb2.FileDescriptorProto(syntax="proto3"))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(message.name))
        for message in file.message_type
    }


def varint(data: Sequence[int], at: int) -> tuple[int, int]:
    """A protocol buffer's integer at a place, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("an integer of more than ten bytes")
