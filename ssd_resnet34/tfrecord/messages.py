"""Protocol buffer messages described in text form: no generated code, no TensorFlow."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format


def message_classes(description: str) -> dict[str, type]:
    """Return the message classes by name of a FileDescriptorProto in text form, without a package.

    They have a descriptor pool of their own, so they do not collide with those of a TensorFlow in
    the same process.
    """
    file = text_format.Parse(description, descriptor_pb2.FileDescriptorProto(syntax="proto3"))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    classes = {}
    for message in file.message_type:
        descriptor = pool.FindMessageTypeByName(message.name)
        classes[message.name] = message_factory.GetMessageClass(descriptor)
    return classes
