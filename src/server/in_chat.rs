//! Errors as chat text, for front ends that show nothing else: what went wrong and what to do next, in the configured
//! language. Off by default: a status is what programs read.

use crate::config::Language;
use crate::error::Error;

/// What a user reads instead of a status.
pub fn text(error: &Error, language: Language) -> String {
    match language {
        Language::En => english(error),
        Language::Zh => chinese(error),
    }
}

/// The message of the API, which is English, and what to do next where it does not say so.
fn english(error: &Error) -> String {
    let next = match error {
        Error::KeyMissing | Error::KeyInvalid => {
            "Check the key in your front end's settings, or ask the operator for one."
        }
        Error::ModelForbidden { .. } => "Choose another model.",
        Error::ModelUnsuited { .. } => "Choose another model.",
        Error::QuotaExceeded => "`/bi` shows the balance, `/redeem <code>` adds to it.",
        Error::LimitReached { .. } => "Wait until it begins anew, or ask the operator.",
        Error::TooManyRequests { .. } | Error::TooManyCalls { .. } => "Wait a little and send it again.",
        Error::NoAccount { .. } => "Choose another model, or ask the operator.",
        Error::NodeUnavailable { .. } | Error::UpstreamFailed { .. } | Error::UpstreamTimeout { .. } => {
            "Send it again; choose another model if that does not help."
        }
        Error::BodyTooLarge { .. } => "Send a shorter conversation, or a smaller file.",
        _ => "",
    };
    format!("⚠️ {error} {next}").trim_end().to_owned()
}

fn chinese(error: &Error) -> String {
    let said = match error {
        Error::KeyMissing => "没有收到 API key。请在客户端设置中填写。".into(),
        Error::KeyInvalid => "API key 无效：不存在、已作废或已过期。请检查客户端设置，或联系管理员。".into(),
        Error::UserFrozen => "该用户已被冻结，请联系管理员。".into(),
        Error::ModelForbidden { model } => format!("此 key 无权使用模型“{model}”，请换一个模型。"),
        Error::ModelUnknown { model } => format!("模型“{model}”不存在，请换一个模型。"),
        Error::ModelUnsuited { model, path } => format!("模型“{model}”不能用于 /v1{path}，请换一个模型。"),
        Error::PathUnknown { .. } => "没有这个接口，请检查客户端设置中的接口地址。".into(),
        Error::MethodNotAllowed { allowed } => format!("此接口只接受 {allowed} 请求。"),
        Error::BodyInvalid { param: Some(param), .. } => format!("请求有误，请检查参数“{param}”。（{error}）"),
        Error::BodyInvalid { param: None, .. } => format!("请求有误。（{error}）"),
        Error::BodyTooLarge { bytes_max } => format!("请求超过 {bytes_max} 字节，请缩短对话或换用较小的文件。"),
        Error::BodyTimeout => "请求没有传完，请重新发送。".into(),
        Error::MediaType { .. } => "请求必须是未压缩的 JSON。".into(),
        Error::QuotaExceeded => "余额不足以完成本次请求。`/bi` 查询余额，`/redeem <充值码>` 充值，或缩短请求。".into(),
        Error::LimitReached { .. } => "已达到额度上限，请等额度重新计算，或联系管理员。".into(),
        Error::TooManyRequests { .. } => "一分钟内请求过多，请稍后重新发送。".into(),
        Error::TooManyCalls { .. } => "同时进行的请求过多，请稍后重新发送。".into(),
        Error::QueueTimeout { .. } | Error::QueueFull { .. } => "目前请求太多，请稍后重新发送。".into(),
        Error::BalanceLocked { .. } => "余额暂时被另一个节点占用，请稍后重新发送。".into(),
        Error::NoAccount { model } => format!("模型“{model}”目前没有可用账号，请换一个模型或联系管理员。"),
        Error::NodeUnavailable { .. } => "服务暂时不可用，请稍后重新发送。".into(),
        Error::Draining => "服务正在重启，请重新发送。".into(),
        Error::UpstreamRefused { message, .. } => format!("上游拒绝了请求：{message}"),
        Error::UpstreamBusy { .. } => "上游限流，请稍后重新发送。".into(),
        Error::UpstreamFailed { .. } => "上游出错，请重新发送；若仍失败，请换一个模型。".into(),
        Error::UpstreamTimeout { .. } => "上游没有及时回答，请重新发送；若仍失败，请换一个模型。".into(),
        Error::Internal => "内部错误，请把请求编号告诉管理员。".into(),
    };
    format!("⚠️ {said}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_reads_what_went_wrong_and_what_to_do_in_either_language() {
        let error = Error::QuotaExceeded;
        assert!(text(&error, Language::En).contains("/redeem"));
        assert!(text(&error, Language::Zh).contains("余额不足"));
        let refused = Error::UpstreamRefused {
            status: 400,
            kind: "invalid_request_error".into(),
            code: None,
            param: None,
            message: "too long".into(),
        };
        for language in [Language::En, Language::Zh] {
            assert!(text(&refused, language).contains("too long"));
        }
    }
}
