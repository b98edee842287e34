// What compilers are told about registers, of which they keep values in more than there are.
#pragma once

namespace hflfnerv {
namespace {

// What is read from p afterwards is read anew, not kept from before.
inline void hide(const float*& p) { asm("" : "+r"(p)); }

}  // namespace
}  // namespace hflfnerv
