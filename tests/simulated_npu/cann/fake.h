// What the parts of the fake CANN share. The prototypes are those of CANN's own headers, which
// torch_npu's wheel carries.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Constants in the headers of torch_npu 2.6 and 2.7 are written as in C++.
#define constexpr static const
#include "third_party/acl/inc/acl/acl.h"
#include "third_party/acl/inc/acl/acl_op_compiler.h"

// An environment variable, or `otherwise` where it is unset.
static inline const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}
