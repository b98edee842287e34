// What compilers are told about registers, of which they keep values in more than there are.
#pragma once

namespace hflfnerv {
namespace {

// What is read from p afterwards is read anew, not kept from before.
template <class T>
inline void hide(const T*& p) {
  asm("" : "+r"(p));
}

// A vector that was read from memory is kept in a register, and not read anew by each instruction that takes it: where vectors
// cross cache lines, reading takes as long as two products.
template <class F>
inline F kept(F v) {
  asm("" : "+v"(v));
  return v;
}

}  // namespace
}  // namespace hflfnerv
