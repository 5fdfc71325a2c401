//! What is heard: sound devices on the guest's side, audio backends on the host's.

use super::address::{DeviceInfo, VirtioOptions};
use super::view::View;
use super::word::words;

words! {
    /// A sound device.
    SoundModel {
        Sb16 = "sb16",
        Es1370 = "es1370",
        Pcspk = "pcspk",
        Ac97 = "ac97",
        Ich6 = "ich6",
        Ich7 = "ich7",
        Ich9 = "ich9",
        Usb = "usb",
        Virtio = "virtio",
    }
}

words! {
    /// What hangs on an HDA bus.
    CodecType {
        Duplex = "duplex",
        Micro = "micro",
        Output = "output",
    }
}

/// `<sound>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sound {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub model: SoundModel,
    /// `<codec type>` of HDA; one duplex codec without any.
    pub codecs: Vec<CodecType>,
    /// `<audio id>`.
    pub audio: Option<u32>,
    /// `multichannel=` of USB.
    pub multichannel: Option<bool>,
    /// `streams=` of virtio.
    pub streams: Option<u32>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

words! {
    /// What plays sound on the host.
    AudioType {
        None = "none",
        Alsa = "alsa",
        Coreaudio = "coreaudio",
        Jack = "jack",
        Oss = "oss",
        Pulseaudio = "pulseaudio",
        Pipewire = "pipewire",
        Sdl = "sdl",
        Spice = "spice",
        File = "file",
        Dbus = "dbus",
    }
}

/// `<audio>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audio {
    /// The line of its element; 0 for the one that is always there.
    pub line: u32,
    /// From 1.
    pub id: u32,
    /// What plays it.
    pub kind: AudioType,
    /// `path=` of a file.
    pub path: Option<String>,
    /// `serverName=` of PulseAudio.
    pub server: Option<String>,
    /// `runtimeDir=` of PipeWire.
    pub runtime_dir: Option<String>,
    /// `driver=` of SDL.
    pub driver: Option<String>,
    /// `timerPeriod=`.
    pub timer_period: Option<u32>,
}

pub(super) fn read_sound(view: &View<'_>) -> Option<Sound> {
    let model = view.required_word("model");
    Some(Sound {
        info: view.device_info(),
        codecs: view.each_some("codec", |codec| codec.required_word("type")),
        audio: view.one_some("audio", |audio| audio.number("id")),
        multichannel: view.switch("multichannel"),
        streams: view.number("streams"),
        virtio: view.virtio_driver(),
        model: model?,
    })
}

pub(super) fn read_audio(view: &View<'_>) -> Option<Audio> {
    let kind = view.required_word("type");
    view.leave_out_elements(
        &["input", "output"],
        "how the host plays sound is left to QEMU",
    );
    view.leave_out(
        &["tryMMap", "exclusive", "dspPolicy", "tryPoll", "nPartials"],
        "how the host plays sound is left to QEMU",
    );
    let id = view.number("id").unwrap_or(0);
    if id == 0 {
        view.error("an audio backend needs an id from 1", None);
    }
    Some(Audio {
        line: view.line(),
        id,
        path: view.attribute("path"),
        server: view.attribute("serverName"),
        runtime_dir: view.attribute("runtimeDir"),
        driver: view.attribute("driver"),
        timer_period: view.number("timerPeriod"),
        kind: kind?,
    })
}
