// What a core function reports. The core prints nothing and throws nothing but bad_alloc: the caller turns a Status
// into its own error.
#pragma once

namespace hflfnerv {

enum class StatusCode {
  ok,
  bad_magic,
  unsupported_version,
  truncated,
  checksum_mismatch,
  invalid_code,
  invalid_bitstream,
};

struct Status {
  StatusCode code = StatusCode::ok;
  const char* message = "";

  bool ok() const { return code == StatusCode::ok; }
};

}  // namespace hflfnerv
